"""M*: the least memory in which a step of LoRA can be done, in bytes of live tensors, from sizes alone.

Knows nothing of libraries, devices or measured memory. What the interpreter, the CUDA context and an
allocator take comes on top of it, as does whatever a kernel takes for itself.

The limit is that of these techniques: the base frozen and held once, in the precision asked for; a
checkpoint at each layer, the layer recomputed in the backward; attention that never holds its scores; a
chunked loss that computes its gradient in the forward; no dropout; a LoRA layer that keeps only its input
and a quantised layer that keeps no dense copy; elementwise operations one by one, as autograd runs them. A
technique beyond these (a fused SwiGLU, layers read from the disk one by one) can go below it.

With T = batch x sequence tokens, N of them with a label, k trained layers, hidden width H, MLP width I,
vocabulary V, C labels in a chunk of the loss, b bytes per activation, the limit is what is always there

    P_linear * bits / 8             weights: every layer reads its own, twice in a step
    (P_embedding + P_other) * b_e   embedding, head, norms, biases: read at every step, not quantised
    P_lora * (b_adapter + b_opt)    the adapter and the moments that Adam keeps from one step to the next

and the most that is there besides at one of four moments:

    at the loss                     G + (k+1) T H b + loss
    in the highest layer            G + (k+1) T H b + layer
    in the lowest trained layer     G (k-1)/k + 2 T H b + layer
    at the update                   G

    G = P_lora * b_adapter          gradients. Where they accumulate over micro-batches they are always there;
                                    else each appears with its layer's backward and G is 0 in the first two
    (k+1) T H b                     the input of each trained layer and of the last norm; each is let go when
                                    its layer's backward is done, and the gradient takes the place of one
    loss = C V (b + 4) + 2 N H b    logits of a chunk and their float32 copy, in which all else is done in place
                                    (C V 4 where b is 4); the hidden states, and their gradient
    layer                           what a layer has saved when recomputed, and its backward at the MLP: `_layer`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from edge_sdss.errors import InputError, message
from edge_sdss.tuning.shapes import Architecture

# NF4 (Dettmers et al., arXiv 2305.14314) has a scale of 8 bits for 64 weights, and one of 32 for 256 scales.
WEIGHT_BITS = MappingProxyType({"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)})

ADAM_BLOCK = 256
ADAM_8BIT_BYTES = 2 * (1 + 4 / ADAM_BLOCK)
"""Of a weight: two moments in 8 bits, with a scale of 32 for 256 of them (arXiv 2110.02861)."""

_INTO_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj"}
_INTO_MLP = {"gate_proj", "up_proj", "gate_up_proj"}


@dataclass(frozen=True)
class Setup:
    """How a step is done: `batch` sequences of `sequence` tokens at a time, and in what precision.

    `adapter_bytes` is that of one weight of the adapter, and of its gradient; `optimizer_bytes` that of all
    its moments (8 for Adam in float32, 2 in 8 bits). `loss_chunk` tokens have logits at a time. `modules`
    are the linears that are adapted, `top_layers` how many layers, from the last one down, and `labels` the
    tokens with a label; None is all. `accumulates`: gradients add up over more than one micro-batch.
    """

    batch: int
    sequence: int
    weight_bits: float
    embedding_bytes: int
    activation_bytes: int
    rank: int
    adapter_bytes: int
    optimizer_bytes: float
    loss_chunk: int
    modules: tuple[str, ...] | None = None
    top_layers: int | None = None
    labels: int | None = None
    accumulates: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class Moment:
    """What is there at one moment of a step, besides what always is. In bytes."""

    name: str
    gradients: int
    boundaries: int
    working: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.gradients + self.boundaries + self.working


@dataclass(frozen=True)
class Limit:
    """M* and its parts, in bytes. `layer` and `loss` are never there together; `peak` says which counts."""

    weights: int
    embeddings: int
    adapter: int
    optimizer: int
    layer: int
    loss: int
    peak: Moment

    @property
    def resident_bytes(self) -> int:
        """What is there from the first step to the last."""
        return self.weights + self.embeddings + self.adapter + self.optimizer

    @property
    def total_bytes(self) -> int:
        """M*."""
        return self.resident_bytes + self.peak.total_bytes


def lower_limit(architecture: Architecture, setup: Setup) -> Limit:
    """Returns M* with its parts. The module's docstring has the formula.

    Raises InputError where the setup names a module that the architecture lacks, more layers than it has,
    more labels than tokens, or a size below 1.
    """
    _check(architecture, setup)
    layers = setup.top_layers or architecture.layers
    lora = adapter_parameters(architecture, setup)
    dense = architecture.embedding_parameters + architecture.other_parameters
    layer, loss = _layer(architecture, setup, through=layers > 1), _loss(architecture, setup)
    gradients = lora * setup.adapter_bytes
    first = gradients if setup.accumulates else 0
    last = gradients if setup.accumulates else gradients * (layers - 1) // layers
    boundary = setup.tokens * architecture.hidden * setup.activation_bytes
    moments = (
        Moment("loss", first, (layers + 1) * boundary, loss),
        Moment("highest layer", first, (layers + 1) * boundary, layer),
        Moment("lowest layer", last, 2 * boundary, _layer(architecture, setup, through=False)),
        Moment("update", gradients, 0, 0),
    )
    return Limit(
        weights=math.ceil(architecture.linear_parameters * setup.weight_bits / 8),
        embeddings=dense * setup.embedding_bytes,
        adapter=lora * setup.adapter_bytes,
        optimizer=math.ceil(lora * setup.optimizer_bytes),
        layer=layer,
        loss=loss,
        peak=max(moments, key=lambda moment: moment.total_bytes),
    )


def adapter_parameters(architecture: Architecture, setup: Setup) -> int:
    """Returns how many numbers are learnt: rank x (inputs + outputs) for each adapted linear."""
    modules = _modules(architecture, setup)
    widths = sum(each.inputs + each.outputs for each in architecture.linears if each.name in modules)
    return (setup.top_layers or architecture.layers) * setup.rank * widths


def _layer(architecture: Architecture, setup: Setup, *, through: bool) -> int:
    """One layer in its backward: what it saved, and the largest of three moments at its MLP.

    `through` says that the gradient goes on to a layer below. An adapted linear saves its input, attention
    its inputs, its result and a float32 per head and token, a norm its input where that is no boundary. The
    MLP comes first in the backward, so all of it is there still. With gate, up, act = f(gate) and
    product = act * up, each I wide, the moments are:

    - at the product: gate, up, act, and the gradients of product, act and up, 6 I;
    - just before, at the down projection: gate, up, act, product where it is adapted, its gradient, and the
      weight in dense form where that is quantised;
    - just after, at the gate's or up's: their gradients, that of their input, one weight in dense form.
    """
    modules = _modules(architecture, setup)
    hidden, mlp, q, kv = architecture.hidden, architecture.mlp, architecture.q, architecture.kv
    per_width = setup.tokens * setup.activation_bytes
    to_attention = through or bool(modules & _INTO_ATTENTION)
    if not to_attention and "o_proj" not in modules:
        # The backward ends within the MLP; this is the least over what may be adapted of it.
        return per_width * mlp * (3 if modules & _INTO_MLP else 1)
    saved = hidden * (bool(modules & _INTO_ATTENTION) + bool(modules & _INTO_MLP)) + q
    saved += hidden * (2 if architecture.sandwich else 1)
    saved += (q + 2 * kv) * to_attention
    saved += (q + kv) * (architecture.qk_norm and (through or modules >= {"q_proj", "k_proj"}))
    at_product = 6 * mlp * per_width
    at_down = ((5 if "down_proj" in modules else 4) * mlp + hidden * architecture.sandwich) * per_width
    after = (2 * mlp + hidden) * per_width
    down, gate = _dense(architecture, setup, "down"), _dense(architecture, setup, "gate")
    log_sums = 4 * setup.tokens * architecture.heads * to_attention
    return saved * per_width + log_sums + max(at_product, at_down + down, after + gate)


def _dense(architecture: Architecture, setup: Setup, name: str) -> int:
    """A weight in the type of the activations, where it is not held so."""
    if setup.weight_bits == 8 * setup.activation_bytes:
        return 0
    linear = next(each for each in architecture.linears if each.name.startswith(name))
    return linear.inputs * linear.outputs * setup.activation_bytes


def _loss(architecture: Architecture, setup: Setup) -> int:
    labels = setup.tokens if setup.labels is None else setup.labels
    # Held in float32 already, logits need no copy.
    per_logit = 4 if setup.activation_bytes == 4 else 4 + setup.activation_bytes
    logits = min(setup.loss_chunk, labels) * architecture.vocabulary * per_logit
    return logits + 2 * labels * architecture.hidden * setup.activation_bytes


def _modules(architecture: Architecture, setup: Setup) -> frozenset[str]:
    return frozenset(each.name for each in architecture.linears) if setup.modules is None else frozenset(setup.modules)


def _check(architecture: Architecture, setup: Setup) -> None:
    names = [each.name for each in architecture.linears]
    asked = "work out the lower limit"
    for name in ("batch", "sequence", "rank", "loss_chunk", "activation_bytes"):
        if getattr(setup, name) < 1:
            raise InputError(message(asked, f"{name} is {getattr(setup, name)}", "give 1 or more"))
    unknown = sorted(_modules(architecture, setup) - set(names))
    if unknown or setup.modules == ():
        found = f"{', '.join(unknown) or 'no linear'} to adapt in a {architecture.family}"
        raise InputError(message(asked, found, f"choose from {', '.join(names)}"))
    for name, most in (("top_layers", architecture.layers), ("labels", setup.tokens)):
        value = getattr(setup, name)
        if value is not None and not 1 <= value <= most:
            raise InputError(message(asked, f"{name} is {value}", f"give 1 to {most}"))
