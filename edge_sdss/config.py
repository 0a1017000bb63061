"""The only home of defaults: one frozen section per stage, read from TOML, overridden by flags.

Knows nothing of the stages themselves; each takes its section as an argument.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_sdss.errors import ConfigError, message

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EoeVariant = Literal["token", "centered", "spectral", "histogram"]
VectorType = Literal["int8", "float16", "float32"]
TrainOn = Literal["accepted", "all"]
Weights = Literal["as loaded", "float32", "bfloat16", "int8", "nf4"]
TensorType = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "adamw-8bit"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reading(_Section):
    """How files of dialogues are read."""

    context_turns: int = Field(4, ge=0, description="turns kept before a prompt")
    max_record_bytes: int = Field(1 << 20, ge=1, description="a longer record is rejected")


class Model(_Section):
    """Which language model learns. None is the embedded default, SmolLM2-135M-Instruct."""

    name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_tokens: int = Field(1024, ge=8, description="tokens of a dialogue that are embedded")


class Selection(_Section):
    """The scores and the replacement rule (paper, section 3.1)."""

    policy: str = "sdss"
    backend: Literal["auto", "numpy", "torch", "cuda"] = "auto"
    eoe: EoeVariant = "centered"
    pooling: Literal["mean", "last"] = "mean"
    text: Literal["dialogue", "prompt"] = "dialogue"
    lexicons: Path | None = Field(None, description="folder of <domain>.txt files, one term a line")
    seed: int = Field(0, ge=0)


class Buffer(_Section):
    """Both budgets are kept: `bins` entries and `max_bytes` of text, vectors, scores, annotations."""

    bins: int = Field(32, ge=1)
    max_bytes: int = Field(32 * 22 * 1024, ge=1, description="the paper's bins are 22 KiB each")
    max_entry_bytes: int = Field(22 * 1024, ge=1, description="size of a bin; a larger dialogue is dropped")
    vectors: VectorType = "int8"


class Store(_Section):
    """`full` syncs every offer to the disk (survives a power cut), `normal` survives a killed process."""

    synchronous: Literal["normal", "full"] = "normal"
    offer_log: int = Field(100_000, ge=1, description="newest decisions kept for reports; older ones only count")


class Review(_Section):
    """How often the user is asked."""

    max_requests_per_day: int = Field(10, ge=0)
    train_on: TrainOn = "accepted"


class Synthesis(_Section):
    """Paraphrases of each annotated exemplar (paper, section 3.2)."""

    variants: int = Field(3, ge=0)
    min_rouge1: float = Field(0.5, ge=0, le=1)
    max_rouge1: float = Field(0.98, ge=0, le=1)
    vary: Literal["both", "prompt"] = "prompt"
    temperature: float = Field(0.5, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(96, ge=1)
    batch_size: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)


class Tuning(_Section):
    """LoRA (Hu et al., arXiv 2106.09685); loss on the response's tokens only."""

    interval: int = Field(800, ge=1, description="offers between rounds (paper: 800)")
    rank: int = Field(8, ge=1, description="of the update of each weight")
    alpha: float = Field(16, gt=0, description="the update is scaled by alpha / rank")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    dora: bool = Field(False, description="learn norms and directions apart (arXiv 2402.09353); takes more memory")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the update's input")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="names of the linears that are adapted, such as q_proj"
    )
    top_layers: int | None = Field(None, ge=1, description="adapt so many layers, from the last one down; None: all")
    weights: Weights = Field("as loaded", description="how the frozen weights are held; int8 and nf4: the linears'")
    compute_dtype: TensorType = Field("bfloat16", description="activations and the other weights, with int8 and nf4")
    adapter_dtype: TensorType = Field("float32", description="of the adapter's weights")
    optimizer: Optimizer = Field("adamw", description="adamw-8bit: its moments take 2 bytes a weight instead of 8")
    checkpointing: Literal["auto", "on", "off"] = Field("auto", description="recompute layers in the backward")
    learning_rate: float = Field(1e-3, gt=0, description="the highest, after the warm-up")
    epochs: int = Field(4, ge=1, description="how often each example is seen")
    batch_size: int = Field(8, ge=1, description="examples of a step")
    max_tokens: int = Field(512, ge=16, description="a longer example is cut")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps")
    clip: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many epochs without a lower held-out loss, and take the best; None: never",
    )
    validation: float = Field(0.1, gt=0, lt=1, description="share of the dialogues held out for that, with patience")
    replay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="at most this share of a round's dialogues is of earlier rounds; None: all that are kept",
    )
    loss_chunk: int = Field(128, ge=1, description="answer tokens whose logits exist at a time")
    memory: int | None = Field(None, ge=1, description="bytes for training, in a process of its own; None: no limit")
    reserve: int = Field(64 << 20, ge=0, description="bytes that stay free on the machine, with a limit of memory")
    max_celsius: float | None = Field(None, description="rest or pause near this heat; None: never")
    checkpoint_every: int = Field(10, ge=1, description="steps")
    seed: int = Field(0, ge=0, description="of the first weights, the order of examples and the dropout")


class Adapt(_Section):
    """When the device tunes by itself. The limits are of any 24 hours."""

    least_new: int = Field(8, ge=1, description="annotated dialogues that no round has seen, for a round to be due")
    poll_s: float = Field(10.0, gt=0, description="between two looks at the conditions")
    idle_share: float = Field(0.2, gt=0, le=1, description="of all cores; idle: others use less")
    cool_c: float = Field(60.0, description="cool: no zone is as hot, °C")
    hot_c: float = Field(75.0, description="with cool, rest or pause near this heat while tuning, °C")
    max_s: float | None = Field(4 * 3600.0, gt=0, description="of work; None: no limit")
    max_j: float | None = Field(None, gt=0, description="of the machine's energy while at work; None: no limit")


class Gate(_Section):
    """When a round is accepted."""

    holdout: float = Field(0.2, ge=0, lt=1, description="share of annotated dialogues never trained on")
    max_forgetting: float = Field(0.05, ge=0, description="nats per token on the general set")


class Evaluation(_Section):
    """How answers are measured."""

    holdout: float = Field(0.2, gt=0, lt=1, description="share of a stream held out by `run`")
    max_items: int = Field(100, ge=1, description="held-out dialogues whose NLL is measured")
    rouge_items: int = Field(32, ge=0, description="of them, how many are answered and compared")
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)


class Chat(_Section):
    """How `chat` answers. None: as the generation_config.json of the bundle says, greedily where it does not."""

    max_new_tokens: int = Field(512, ge=1, description="of an answer")
    temperature: float | None = Field(None, ge=0, description="0: greedily")
    top_p: float | None = Field(None, gt=0, le=1, description="mass of the most probable tokens that may come")
    top_k: int | None = Field(None, ge=0, description="how many of the most probable tokens may come; 0: all")
    repetition_penalty: float | None = Field(None, gt=0, description="above 1: tokens that were seen come less often")
    stop: tuple[str, ...] = Field((), description="texts before which an answer ends")
    seed: int = Field(0, ge=0, description="of the draws; an answer's own is this and its number in the conversation")


class Profile(_Section):
    """How latency, energy and memory are measured."""

    runs: int = Field(5, ge=1, description="blocks of repetitions of each case, in random order among the cases")
    repetitions: int = Field(10, ge=1, description="of each case, at least, over all runs")
    seconds: float = Field(10.0, ge=0, description="of each case, at least, over all runs")
    warmups: int = Field(1, ge=0, description="repetitions before each run that are not counted")
    prompt_tokens: int = Field(512, ge=1, description="of `prefill`")
    new_tokens: int = Field(128, ge=2, description="of `decode`")
    interval_s: float = Field(0.1, gt=0, description="between two passes over the sensors, on average")
    jitter: float = Field(0.3, ge=0, lt=1, description="share of the interval; a fixed one aliases with the load")
    idle_s: float = Field(5.0, ge=0, description="idle power is measured so long, before and after")
    cool_c: float | None = Field(None, description="wait before each run until no zone is hotter, °C")
    cool_timeout_s: float = Field(300.0, ge=0, description="and at most so long")
    clocks: Literal["observe", "require", "set"] = Field("observe", description="set: lock, and restore after")
    seed: int = Field(0, ge=0)


class Config(_Section):
    """Every setting of the product."""

    reading: Reading = Reading()
    model: Model = Model()
    selection: Selection = Selection()
    buffer: Buffer = Buffer()
    store: Store = Store()
    review: Review = Review()
    synthesis: Synthesis = Synthesis()
    tuning: Tuning = Tuning()
    adapt: Adapt = Adapt()
    gate: Gate = Gate()
    evaluation: Evaluation = Evaluation()
    chat: Chat = Chat()
    profile: Profile = Profile()

    def override(self, values: Mapping[str, Mapping[str, Any]]) -> Config:
        """Returns a copy in which `values[section][name]` replace the settings; None leaves one as it is.

        Raises ConfigError where a section or name is unknown or a value out of range.
        """
        merged = self.model_dump()
        for section, settings in values.items():
            given = {name: value for name, value in settings.items() if value is not None}
            merged[section] = {**merged.get(section, {}), **given}
        return _validated(merged, "the flags")


def load(path: Path | None) -> Config:
    """Reads a TOML file; None gives the defaults. Raises ConfigError, which names the setting."""
    if path is None:
        return Config()
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(message(f"read settings from {path}", str(error.strerror), "check --config")) from error
    except ValueError as error:
        raise ConfigError(message(f"read settings from {path}", f"no valid TOML, {error}", "mend that line")) from error
    return _validated(values, str(path))


def parse(text: str) -> dict[str, Any]:
    """Reads TOML; raises ValueError."""
    return tomllib.loads(text)


def _validated(values: Mapping[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            message(f"set {name} from {origin}", first["msg"], "see `edge-sdss COMMAND --help`")
        ) from error
