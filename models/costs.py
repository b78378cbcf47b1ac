"""Parameters and floating-point operations of operators and of whole models, by two counts.

The paper's count (arXiv 2506.05340, Table 4) gives its published figures. Two operations a
multiply-add; the attention core is 4ND + 2NH a token (scores, values, and a softmax at two a score
and head), which a window scales by its share of the N tokens; an elementwise product is one a
channel; an inner convolution of K taps 2K a channel; Mamba-2's core 2 * d_inner * d_state. "op" is
this core against that of attention. "ft" is projections and featurizer convolution, in
multiply-adds, against the 4D^2 + 4D parameters of attention's projections. In the mlp slot the
whole operator is "op". Two entries are odd, and are kept as published:

- Mamba-2's ft is the share itself, 155.77 % of attention's projections at 100 %, where every other
  entry is a difference. The difference is +55.77 (`ft_difference`). Its convolution is not in it.
- MLP Hyena-X counts its two gates (4D against 16D^2) and leaves out its convolution (48D).

The full count leaves nothing of the operator out: two operations a multiply-add, one for any other
sum, product or function value of an element (biases, gates, GELU, SiLU, normalisation), two a score
and head for softmax, windows cut off at the ends of the sequence, the convolutions, and Mamba-2 as
the recurrence that it computes: decaying and updating the state, and reading it out. (In chunks, as
it is run, it takes more operations, in matrix products.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from models.config_files import REPOSITORY, read_yaml
from models.dit import DiT
from models.graft_plan import GraftPlan
from models.grafting import graft
from models.operators import OPERATORS, build_operator, complete_config
from models.presets import MAX_TOKENS, PRESETS, build_model

COUNTS = ("paper", "full")
SHARES = (50, 75, 100)  # % of the blocks

# Rows of the paper's table: label, operator, its file in configs/, and op, ft and parameters in %
# of all operators of the slot at each of SHARES (arXiv 2506.05340, Table 4).
PUBLISHED = (
    ("Hyena-SE", "hyena_se", "sequence_mixers/hyena_se.yaml",
     ((-49.52, 0.13, 0.22), (-74.27, 0.20, 0.33), (-99.03, 0.26, 0.43))),
    ("Hyena-X", "hyena_x", "sequence_mixers/hyena_x.yaml",
     ((-49.90, 0.13, 0.16), (-74.85, 0.20, 0.24), (-99.81, 0.26, 0.33))),
    ("Hyena-Y", "hyena_y", "sequence_mixers/hyena_y.yaml",
     ((-49.52, 0.0, 0.05), (-74.27, 0.0, 0.08), (-99.03, 0.0, 0.11))),
    ("SWA w=4", "swa", "sequence_mixers/swa.yaml",
     ((-48.24, 0.0, 0.0), (-72.36, 0.0, 0.0), (-96.48, 0.0, 0.0))),
    ("Mamba-2", "mamba2", "sequence_mixers/mamba2.yaml",
     ((-37.59, 77.89, 28.02), (-56.38, 116.83, 42.04), (-75.17, 155.77, 56.05))),
    ("MLP r=3", "mlp", "channel_mixers/mlp_ratio_3.yaml",
     ((-12.50, 0.0, -12.50), (-18.75, 0.0, -18.75), (-25.00, 0.0, -25.00))),
    ("MLP r=6", "mlp", "channel_mixers/mlp_ratio_6.yaml",
     ((25.00, 0.0, 25.00), (37.50, 0.0, 37.50), (50.00, 0.0, 50.00))),
    ("MLP Hyena-X r=2", "mlp_hyena_x", "channel_mixers/mlp_hyena_x.yaml",
     ((0.01, 0.0, 0.02), (0.02, 0.0, 0.03), (0.02, 0.0, 0.03))),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Arithmetic: multiply-adds, and other operations on single numbers."""

    multiply_adds: float = 0.0
    other: float = 0.0

    @property
    def flops(self) -> float:
        return 2 * self.multiply_adds + self.other

    def __add__(self, more: "Work") -> "Work":
        return Work(self.multiply_adds + more.multiply_adds, self.other + more.other)

    def __mul__(self, times: float) -> "Work":
        return Work(self.multiply_adds * times, self.other * times)


@dataclass(frozen=True)
class OperatorCost:
    """One operator: work a token in core ("op") and projections ("ft"), and its parameters."""

    core: Work
    projections: Work
    parameters: int

    @property
    def total(self) -> Work:
        return self.core + self.projections


@dataclass(frozen=True)
class Change:
    """What grafts cost, in % of what all original operators of their slot cost.

    op, ft: core and projections. ft_difference: differs from `ft` only in the paper's count of
    Mamba-2, see the top of this file. params: parameters.
    """

    op: float
    ft: float
    ft_difference: float
    params: float


@dataclass(frozen=True)
class ModelCost:
    """A whole model: its parameters, with the fixed position table, and the work of one forward.

    The work is that of one image by the full count; norms, modulation and residual sums around the
    slots, which no graft changes (0.1 %), are left out.
    """

    parameters: int
    work: Work


# -- one operator --------------------------------------------------------------


def operator_cost(
    operator: str, config: Mapping, num_tokens: int, count: str = "full"
) -> OperatorCost:
    """The cost of one operator.

    Args:
        operator: name in `models.operators.OPERATORS`.
        config: complete constructor arguments, from `complete_config`.
        num_tokens: length of the sequence it runs on.
        count: "paper" or "full"; parameters are the same in both.

    Raises:
        ValueError: another count.
    """
    if count not in COUNTS:
        raise ValueError(f"count {count!r}: choose one of {', '.join(COUNTS)}")
    with torch.device("meta"):
        module = build_operator(operator, **config)
    measure = _paper_work if count == "paper" else _full_work
    core, projections = measure(operator, config, num_tokens, module)
    return OperatorCost(core, projections, _parameters(module))


def _paper_work(name: str, config: Mapping, tokens: int, module: nn.Module) -> tuple[Work, Work]:
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    weights = Work(sum(m.weight.numel() for m in linear))
    projections = Work(sum(_parameters(m) for m in linear))  # multiply-adds against parameters
    if name == "mlp":
        return weights, Work()
    if name == "mlp_hyena_x":
        return weights + Work(other=2 * module.out_proj.in_features), Work()
    if name == "mha":
        return _attention(config["dim"], config["num_heads"], tokens), projections
    if name == "swa":
        seen = min(sum(config["window_size"]) + 1, tokens)
        return _attention(config["embed_dim"], config["num_heads"], seen), projections
    if name == "mamba2":
        return Work(module.d_inner * module.d_state), projections
    core, featurizer = Work(other=2 * config["d_model"]), Work()
    if hasattr(module, "inner_filter"):
        core += Work(module.inner_filter.weight.numel())
    if hasattr(module, "short_filter"):
        featurizer = Work(module.short_filter.weight.numel())
    return core, projections + featurizer


def _full_work(name: str, config: Mapping, tokens: int, module: nn.Module) -> tuple[Work, Work]:
    linear = [_affine(m) for m in module.modules() if isinstance(m, nn.Linear)]
    projections = sum(linear, Work())
    if name == "mha":
        return _attention(config["dim"], config["num_heads"], tokens), projections
    if name == "swa":
        seen = _seen_in_window(tokens, *config["window_size"])
        return _attention(config["embed_dim"], config["num_heads"], seen), projections
    if name == "mlp":
        return projections + Work(other=module.fc1.out_features), Work()  # GELU
    if name == "mlp_hyena_x":
        channels, width = module.in_proj.out_features, module.out_proj.in_features
        taps = config["short_filter_order"]
        mixing = Work(channels * taps, other=channels) + Work(other=2 * width)
        return projections + mixing, Work()
    if name == "mamba2":
        return _mamba2_core(module), projections + _affine(module.conv1d) + _silu(module.conv1d)
    core = Work(other=2 * config["d_model"])
    if hasattr(module, "inner_filter"):
        core += _affine(module.inner_filter)
    if hasattr(module, "short_filter"):
        projections += _affine(module.short_filter)
    return core, projections


def _attention(width: int, heads: int, seen: float) -> Work:
    """Scores, values and softmax of one token that sees `seen` others."""
    return Work(2 * seen * width, other=2 * seen * heads)


def _seen_in_window(tokens: int, left: int, right: int) -> float:
    """How many tokens a token sees, itself among them, on average over the sequence."""
    seen = sum(min(i, left) + 1 + min(tokens - 1 - i, right) for i in range(tokens))
    return seen / tokens


def _mamba2_core(module: nn.Module) -> Work:
    states = module.d_inner * module.d_state
    step = Work(other=4 * module.heads)  # bias, softplus, times A, exp
    update = Work(states, other=states + module.d_inner)  # a * S + (dt * x) B^T
    readout = Work(states + module.d_inner)  # S C + D * x
    gate = Work(other=2 * module.d_inner)  # y * SiLU(z)
    norm = Work(module.d_inner, other=2 * module.d_inner)  # mean square, scale, weight
    return step + update + readout + gate + (Work() if module.norm is None else norm)


def _affine(module: nn.Module) -> Work:
    """A linear map of one token, or a convolution along tokens: weights, and a sum for the bias."""
    return Work(module.weight.numel(), 0 if module.bias is None else module.bias.numel())


def _silu(module: nn.Module) -> Work:
    return Work(other=module.weight.shape[0])


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- shares of a model ---------------------------------------------------------


def original_cost(
    slot: str, hidden_size: int, num_heads: int, num_tokens: int, count: str
) -> OperatorCost:
    """The OperatorCost of the attention or MLP that a DiT has in `slot`."""
    name, config = {
        "mha": ("mha", {"dim": hidden_size, "num_heads": num_heads, "qkv_bias": True}),
        "mlp": ("mlp", {"d_model": hidden_size, "expansion_ratio": 4}),
    }[slot]
    return operator_cost(name, config, num_tokens, count)


def change(
    operator: str, config: Mapping, share: float, num_heads: int, num_tokens: int, count: str
) -> Change:
    """What `operator` changes where it stands in a `share` (0..1) of the blocks; in %.

    `num_heads` is that of the attention it replaces; `count` is "paper" or "full".
    """
    spec = OPERATORS[operator]
    original = original_cost(spec.slot, config[spec.width], num_heads, num_tokens, count)
    new = operator_cost(operator, config, num_tokens, count)
    op = _percent(new.core.flops, original.core.flops)
    difference = _percent(new.projections.flops, original.projections.flops)
    odd = count == "paper" and operator == "mamba2"
    return Change(
        op=share * op,
        ft=share * (difference + 100 if odd else difference),
        ft_difference=share * difference,
        params=share * _percent(new.parameters, original.parameters),
    )


def _percent(new: float, old: float) -> float:
    return 100 * (new - old) / old if old else 0.0  # the mlp slot has no ft


def slot_changes(plan: GraftPlan, count: str) -> dict[str, Change]:
    """The Change of each slot that the plan grafts, all its operators together."""
    tokens, heads = _tokens(plan), PRESETS[plan.model_name]["num_heads"]
    slots: dict[str, Change] = {}
    for entry in plan.grafts:
        share = len(entry.blocks) / plan.depth
        one = change(entry.operator, entry.config, share, heads, tokens, count)
        so_far = slots.get(entry.slot, Change(0.0, 0.0, 0.0, 0.0))
        slots[entry.slot] = Change(
            **{name: getattr(so_far, name) + getattr(one, name) for name in vars(one)}
        )
    return slots


def paper_table() -> list[dict]:
    """The paper's table: for each operator and share its figures, ours by its count and in full.

    -> dicts with label, operator, share (%), and "published", "paper" and "full" as [op, ft,
    params] in %, "ft_difference" by the paper's count.
    """
    preset = PRESETS["DiT-XL/2"]
    sizes = {key: preset[key] for key in ("hidden_size", "num_heads")}
    tokens = 256
    rows = []
    for label, operator, file, published in PUBLISHED:
        config = complete_config(
            operator, read_yaml(REPOSITORY / "configs" / file), **sizes, num_tokens=tokens
        )
        for share, figures in zip(SHARES, published, strict=True):
            changes = {
                count: change(operator, config, share / 100, sizes["num_heads"], tokens, count)
                for count in COUNTS
            }
            row = {"label": label, "operator": operator, "share": share}
            row["published"] = list(figures)
            for count, c in changes.items():
                row[count] = [c.op, c.ft, c.params]
            row["ft_difference"] = changes["paper"].ft_difference
            rows.append(row)
    return rows


# -- whole models --------------------------------------------------------------


def model_cost(plan: GraftPlan) -> ModelCost:
    """The plan's model; `plain(plan)` gives what to compare it with. Captions count at full length:
    so they are run."""
    model, tokens = meta_model(plan), _tokens(plan)
    slots = [op for block in model.blocks for op in (block.attn, block.mlp)]
    inside = {id(module) for slot in slots for module in slot.modules()}
    work = Work()
    for name, module in model.named_modules():
        if id(module) not in inside and isinstance(module, (nn.Linear, nn.Conv2d)):
            work += _affine(module) * _times(name, tokens, plan.captioned)
    if plan.captioned:  # cross-attention
        core = _attention(model.hidden_size, model.num_heads, MAX_TOKENS)
        work += core * (plan.depth * tokens)
    for slot in ("mha", "mlp"):
        kept = plan.depth - len(plan.grafted_blocks(slot))
        cost = original_cost(slot, model.hidden_size, model.num_heads, tokens, "full")
        work += cost.total * (kept * tokens)
    for entry in plan.grafts:
        cost = operator_cost(entry.operator, entry.config, tokens)
        work += cost.total * (len(entry.blocks) * tokens)
    return ModelCost(_parameters(model), work)


def _times(name: str, tokens: int, captioned: bool) -> int:
    """How many vectors a layer outside the slots maps: of tokens, of a caption's, or one."""
    if captioned:
        once, text = ("adaln_single.",), ("caption_projection.", ".attn2.to_k", ".attn2.to_v")
        if name.startswith(once):
            return 1
        return MAX_TOKENS if any(part in f".{name}" for part in text) else tokens
    on_tokens = ("x_embedder.", "merges.", "final_layer.linear")
    return tokens if name.startswith(on_tokens) else 1


def plain(plan: GraftPlan) -> GraftPlan:
    """The plan without its grafts, pairs and files."""
    return replace(plan.plain(), base_ckpt_path=None)


def meta_model(plan: GraftPlan) -> DiT:
    """The plan's model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return graft(build_model(plan), plan).to("meta")


def _tokens(plan: GraftPlan) -> int:
    return (plan.input_size // PRESETS[plan.model_name]["patch_size"]) ** 2
