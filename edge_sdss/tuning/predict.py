"""How many bytes of live tensors a step of this package's own training takes at its peak, from sizes alone.

Where `limit` says how little could do, this follows what the layers, norms, checkpoints and loss of this
package do, tensor by tensor, so that a plan can be believed before anything is loaded. Knows nothing of the
interpreter, of an allocator, or of what a kernel takes for itself while it runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_sdss.tuning.limit import Setup, adapter_parameters, lower_limit
from edge_sdss.tuning.shapes import Architecture

_DECODED = 1 << 16  # weights that become dense at a time, see `layers.frozen`
_QUERIES = {"q_proj", "k_proj", "v_proj", "qkv_proj"}
_GATES = {"gate_proj", "up_proj", "gate_up_proj"}


@dataclass(frozen=True)
class Parts:
    """What is there at the peak, in bytes; `moment` says when that is.

    `kept` are the inputs of the layers where these are checkpointed, else all that they save for the backward.
    `working` is what that moment itself takes: one layer's tensors, or a chunk of logits.
    """

    moment: str
    weights: int
    embeddings: int
    adapter: int
    optimizer: int
    gradients: int
    kept: int
    working: int
    other: int

    @property
    def resident_bytes(self) -> int:
        """What is there from the first step to the last."""
        return self.weights + self.embeddings + self.adapter + self.optimizer

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return self.resident_bytes + self.gradients + self.kept + self.working + self.other


def predict(architecture: Architecture, setup: Setup, *, checkpointing: bool, dropout: bool = False) -> Parts:
    """Returns the peak of a step of `setup.batch` x `setup.sequence` tokens, by parts.

    Every sequence has that length and, where `setup.labels` is None, a label at each of its tokens. Weights
    whose bits are not those of the activations are int8 or NF4. Raises InputError where `lower_limit` does.
    """
    lower_limit(architecture, setup)  # for its checks
    step = _Step(architecture, setup, checkpointing, dropout)
    peak = max(step.moments(), key=lambda moment: moment.gradients + moment.kept + moment.working)
    dense = architecture.embedding_parameters + architecture.other_parameters
    return Parts(
        moment=peak.name,
        weights=weight_bytes(architecture, setup),
        embeddings=dense * setup.embedding_bytes,
        adapter=step.lora * setup.adapter_bytes,
        optimizer=math.ceil(step.lora * setup.optimizer_bytes),
        gradients=peak.gradients,
        kept=peak.kept,
        working=peak.working,
        other=step.other(),
    )


def weight_bytes(architecture: Architecture, setup: Setup) -> int:
    """Returns what the layers' linears take, scales and padding counted: see `layers.frozen`."""
    if not _quantised(setup):
        return architecture.linear_parameters * setup.activation_bytes
    each = []
    for linear in architecture.linears:
        weights = linear.inputs * linear.outputs
        if setup.weight_bits == 8:
            each.append(weights + 4 * linear.outputs)
        else:
            blocks = math.ceil(weights / 64)
            each.append(32 * blocks + 260 * math.ceil(blocks / 256) + 4)
    return architecture.layers * sum(each)


@dataclass(frozen=True)
class _Moment:
    name: str
    gradients: int
    kept: int
    working: int


class _Step:
    """The moments at which a step may be largest. All widths are in bytes of a micro-batch's tokens."""

    def __init__(self, architecture: Architecture, setup: Setup, checkpointing: bool, dropout: bool):
        self._architecture = architecture
        self._setup = setup
        self._checkpointing = checkpointing
        self._dropout = dropout
        self._layers = setup.top_layers or architecture.layers
        every = frozenset(each.name for each in architecture.linears)
        self._adapted = every if setup.modules is None else frozenset(setup.modules)
        self._token = setup.tokens * setup.activation_bytes
        self.lora = adapter_parameters(architecture, setup)

    def moments(self) -> tuple[_Moment, ...]:
        """All of them. `kept` has the last norm's input too, whose place the gradient takes."""
        layers, through = self._layers, self._layers > 1
        gradients = self.lora * self._setup.adapter_bytes
        own = gradients // layers
        early, late = (gradients, gradients) if self._setup.accumulates else (0, gradients - own)
        boundary = self._architecture.hidden * self._token
        if self._checkpointing:
            # A checkpointed layer hands over all its gradients at once, beside those that accumulate.
            kept, below, last, handed = (layers + 1) * boundary, (layers + 1) * boundary, 2 * boundary, own
        else:
            # Without checkpoints no one asks for the lowest layer's input.
            below = layers * boundary + ((layers - 2) * self._saved(True) + self._saved(False) if through else 0)
            kept, last, handed = below + self._saved(through), boundary, 0
        return (
            _Moment("loss", early, kept, self._loss()),
            _Moment("highest layer", early, below, self._backward(through)),
            _Moment("lowest layer", late, last, self._backward(False)),
            _Moment("end of the lowest layer", late + handed, last, 0),
            _Moment("update", gradients, 0, 0),
        )

    def other(self) -> int:
        """Ids, a mask of ones, positions of answers and targets; the rotation's cosines and sines; masks."""
        setup, architecture = self._setup, self._architecture
        ids = 8 * (2 * setup.tokens + 2 * self._labels)
        rotations = 2 if architecture.family == "gemma3_text" else 1  # near and far layers have one each
        rotation = 2 * rotations * setup.sequence * architecture.head_dim * setup.activation_bytes
        norm = 4 * setup.tokens
        return ids + rotation + norm + self._mask(1)

    @property
    def _narrow(self) -> bool:
        return any(window is not None and window <= self._setup.sequence for window in self._architecture.windows)

    @property
    def _labels(self) -> int:
        return self._setup.tokens if self._setup.labels is None else self._setup.labels

    def _loss(self) -> int:
        """Logits of a chunk, with their float32 copy; the answers' hidden states and their gradient."""
        b = self._setup.activation_bytes
        logits = min(self._setup.loss_chunk, self._labels) * self._architecture.vocabulary * (4 if b == 4 else 4 + b)
        return logits + 2 * self._labels * self._architecture.hidden * b

    def _saved(self, through: bool) -> int:
        """What a layer saves besides its input, in bytes. `through`: the gradient goes on to a layer below."""
        mlp = self._architecture.mlp
        if self._ends_in_mlp(through):
            return (self._before_mlp(through) + mlp * (4 if self._adapted & _GATES else 1)) * self._token
        post = self._architecture.hidden * self._architecture.sandwich
        product = mlp * ("down_proj" in self._adapted)
        return (self._before_mlp(through) + post + 3 * mlp + product) * self._token + self._small(through)

    def _backward(self, through: bool) -> int:
        """The largest of three moments in the backward of a layer's MLP, where all before it is there still.

        With gate, up, act = f(gate) and product = act * up: just after the down projection's backward, with
        the gradient of the product; at the product's, with those of act and up too; at the up projection's.
        """
        hidden, mlp = self._architecture.hidden, self._architecture.mlp
        before = self._before_mlp(through) * self._token + self._small(through)
        if self._ends_in_mlp(through) and not self._adapted & _GATES:
            # In the forward: the residual, the norm's result, act, up and product.
            return before + (2 * hidden + 3 * mlp) * self._token
        product = mlp * ("down_proj" in self._adapted)
        masks = 3 * mlp * self._dropout
        sandwich = hidden * self._architecture.sandwich
        down = (3 * mlp + product + sandwich) * self._token + self._matmul(mlp + masks, "down")
        middle = 6 * mlp * self._token
        up = 3 * mlp * self._token + self._matmul(hidden + 3 * hidden * self._dropout, "up", "gate_up")
        return before + max(down, middle, up) + self._update("down_proj")

    def _before_mlp(self, through: bool) -> int:
        """Width of what attention and the norms save besides the layer's input."""
        a = self._architecture
        width = a.hidden * bool(self._adapted & _GATES)
        if self._ends_in_mlp(through):
            return width
        width += a.hidden * (2 if a.sandwich else 1) + a.q  # inputs of norms, what attention returns
        width += a.hidden * bool(self._adapted & _QUERIES)
        fused = any(each.name == "qkv_proj" for each in a.linears)
        if fused and "o_proj" in self._adapted:
            width += a.q  # a copy in the order that the projection wants
        if through or self._adapted & _QUERIES:
            if self._narrow and a.kv < a.q:
                width += 3 * a.q  # with a mask, each head gets its own copy of keys and values
            else:
                # Values that are a view of queries, keys and values hold them all.
                width += a.q + a.kv + (a.q + 2 * a.kv if fused else a.kv)
        if a.qk_norm and (through or self._adapted & {"q_proj", "k_proj"}):
            width += a.q + a.kv
        return width

    def _small(self, through: bool) -> int:
        """A float32 per token of each norm, and per head of attention and its norms."""
        a = self._architecture
        if self._ends_in_mlp(through):
            return 0
        numbers = (4 if a.sandwich else 2) + a.heads + (a.heads + a.kv_heads if a.qk_norm else 0)
        return 4 * numbers * self._setup.tokens + self._mask(self._setup.activation_bytes)

    def _mask(self, each: int) -> int:
        """Of a window that the sequence fills; attention has its own copy, in the type of the activations."""
        return self._narrow * self._setup.tokens * self._setup.sequence * each

    def _ends_in_mlp(self, through: bool) -> bool:
        return not through and not self._adapted & {*_QUERIES, "o_proj"}

    def _matmul(self, width: int, *names: str) -> int:
        """A product of `width`, and the dense form of a quantised weight, whose last piece is decoded before it."""
        setup, result = self._setup, width * self._token
        if not _quantised(setup):
            return result
        linear = next(each for each in self._architecture.linears if each.name.removesuffix("_proj") in names)
        weights = linear.inputs * linear.outputs
        # A weight is float32 before it is rounded, and a code of NF4 an int32 for two.
        decoding = min(_DECODED, weights) * (4 if setup.weight_bits == 8 else 6)
        return weights * setup.activation_bytes + max(result, decoding)

    def _update(self, name: str) -> int:
        """An adapted linear's new gradients, and A and B in the type of the activations."""
        if name not in self._adapted:
            return 0
        setup = self._setup
        linear = next(each for each in self._architecture.linears if each.name == name)
        copies = setup.activation_bytes if setup.activation_bytes != setup.adapter_bytes else 0
        each = (setup.adapter_bytes + copies) * (linear.inputs + linear.outputs)
        return setup.rank * each


def _quantised(setup: Setup) -> bool:
    return setup.weight_bits != 8 * setup.activation_bytes
