// Reads launches from stdin, runs them, writes the outputs to stdout. A launch is a line
//     entry grid_x grid_y block arguments
// and for each argument either `I value` or `B size shift output` with the buffer's bytes after it.
// kernels.inc includes the sources and names their entries as ENTRY(name).
#include "cuda_on_cpu.h"

#define INCLUDES
#include "kernels.inc"
#undef INCLUDES

#include <iostream>
#include <string>
#include <utility>

struct Argument {
    long long value = 0;
    std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
    char* data = nullptr;
    size_t size = 0;
    bool output = false;

    operator int() const { return (int)value; }
    operator long long() const { return value; }
    template <class T> operator T*() const { return reinterpret_cast<T*>(data); }
};

template <class... A, size_t... I>
void call(void (*kernel)(A...), const std::vector<Argument>& arguments, std::index_sequence<I...>) {
    if (arguments.size() != sizeof...(A)) cuda_on_cpu::fail("another number of arguments");
    kernel(static_cast<A>(arguments[I])...);
}

template <class... A> void call(void (*kernel)(A...), const std::vector<Argument>& arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
}

static void run(const std::string& entry, const std::vector<Argument>& arguments) {
#define ENTRY(NAME) if (entry == #NAME) return call(NAME, arguments);
#include "kernels.inc"
    cuda_on_cpu::fail("no such entry");
}

int main() {
    std::ios::sync_with_stdio(false);
    std::string entry;
    dim3 grid;
    unsigned block;
    size_t count;
    while (std::cin >> entry >> grid.x >> grid.y >> block >> count) {
        std::vector<Argument> arguments(count);
        for (auto& argument : arguments) {
            char kind;
            std::cin >> kind;
            if (kind == 'I') {
                std::cin >> argument.value;
                continue;
            }
            size_t shift;
            std::cin >> argument.size >> shift >> argument.output;
            std::cin.get();
            void* memory = nullptr;  // ends with the buffer, so that a byte too far is seen
            if (posix_memalign(&memory, 256, shift + argument.size)) return 1;
            argument.memory.reset((char*)memory);
            argument.data = argument.memory.get() + shift;
            std::cin.read(argument.data, (std::streamsize)argument.size);
        }
        cuda_on_cpu::launch(grid, block, [&] { run(entry, arguments); });
        for (auto& argument : arguments)
            if (argument.output) std::cout.write(argument.data, (std::streamsize)argument.size);
    }
}
