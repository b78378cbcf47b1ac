"""The one table of operators that can stand in a block's mha or mlp slot, by name.

    op = build_operator("hyena_y", d_model=1152, inner_filter_len=4)    # [B,T,D] -> [B,T,D]

Configurations keep the argument names of the published operator YAMLs. Everything here needs torch
and timm alone.
"""

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn

from models.operators.attention import SlidingWindowAttention, build_mha
from models.operators.hyena import HyenaSE, HyenaX, HyenaY, MlpHyenaX
from models.operators.mamba2 import Mamba2
from models.operators.mlp import build_mlp

logger = logging.getLogger(__name__)

HYENA_L_MAX = 1_000_000
# of sizes and ratios, and of numbers of tokens; beyond them tensors cannot even be described
MOST, MOST_LENGTH = 2**16, 2**24


@dataclass(frozen=True)
class Setting:
    """What one configuration key may hold, and whether the builder gets to see it."""

    legal: str
    accepts: Callable[[object], bool]
    passed: bool = True
    hint: bool = False


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return _is_int(value) or (isinstance(value, float) and not math.isnan(value))


def _is_pair(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def _is_dt_limit(value) -> bool:
    if not _is_pair(value) or not _is_number(value[0]) or value[0] < 0:
        return False
    return value[1] is None or (_is_number(value[1]) and value[1] > value[0])


def _only(*values) -> Setting:
    def same(value):  # True is not 1 here
        return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)

    words = {None: "null", True: "true", False: "false"}
    legal = " or ".join(str(v) if _is_number(v) else words[v] for v in values)
    return Setting(legal, same, passed=False)


def _count(most: int) -> Setting:
    return Setting(f"a whole number from 1 to {most}", lambda v: _is_int(v) and 0 < v <= most)


COUNT = _count(MOST)
LENGTH = _count(MOST_LENGTH)
FLAG = Setting("true or false", lambda v: isinstance(v, bool))
RATIO = Setting(f"a number above 0, up to {MOST}", lambda v: _is_number(v) and 0 < v <= MOST)
SCALE = Setting(f"null or {RATIO.legal}", lambda v: v is None or RATIO.accepts(v))
DROPOUT = Setting("a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1)
WINDOW = Setting(
    f"two whole numbers [left, right], each from 0 to {MOST_LENGTH}",
    lambda v: _is_pair(v) and all(_is_int(n) and 0 <= n <= MOST_LENGTH for n in v),
)
DT_LIMIT = Setting("[low, high] with 0 <= low < high, or high null for no bound", _is_dt_limit)
UNREAD = Setting("any value", lambda v: True, passed=False)  # means nothing for what is supported
HINT = Setting("any value", lambda v: True, passed=False, hint=True)

_HYENA = {
    "d_model": COUNT,
    "l_max": LENGTH,
    "order": _only(2),
    "inner_factor": _only(1),
    "num_heads": _only(1),
    "num_blocks": _only(1),
    "short_filter_order": COUNT,
    "fused_bias_fc": HINT,
}
_UNREAD_LENGTH = Setting(COUNT.legal, COUNT.accepts, passed=False)


@dataclass(frozen=True)
class OperatorSpec:
    """One operator.

    slot: "mha" or "mlp". builder: called with the settings that are `passed`. width: the key that
    must equal the model's hidden size. tensors, optional_tensors: the state-dict names by which a
    stored operator is recognised. inherits: new tensor name -> name in the operator it replaces,
    for what can be taken over from there.
    """

    slot: str
    builder: Callable[..., nn.Module]
    width: str
    settings: dict[str, Setting]
    required: frozenset[str]
    tensors: frozenset[str]
    optional_tensors: frozenset[str] = frozenset()
    inherits: dict[str, str] = field(default_factory=dict)


_HYENA_TENSORS = {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}
_SHORT = {"short_filter.weight", "short_filter.bias"}
_INNER = {"inner_filter.weight", "inner_filter.bias"}
_FROM_ATTENTION = {
    "in_proj.weight": "qkv.weight",
    "in_proj.bias": "qkv.bias",
    "out_proj.weight": "proj.weight",
    "out_proj.bias": "proj.bias",
}


def _hyena(builder: Callable[..., nn.Module], filters: set[str], **settings) -> OperatorSpec:
    return OperatorSpec(
        slot="mha",
        builder=builder,
        width="d_model",
        settings=_HYENA | settings,
        required=frozenset({"d_model"}),
        tensors=frozenset(_HYENA_TENSORS | filters),
        inherits=_FROM_ATTENTION,
    )


OPERATORS: dict[str, OperatorSpec] = {
    "mha": OperatorSpec(
        slot="mha",
        builder=build_mha,
        width="dim",
        settings={"dim": COUNT, "num_heads": COUNT, "qkv_bias": FLAG},
        required=frozenset({"dim", "num_heads"}),
        tensors=frozenset({"qkv.weight", "proj.weight", "proj.bias"}),
        optional_tensors=frozenset({"qkv.bias"}),
        inherits={name: name for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")},
    ),
    "swa": OperatorSpec(
        slot="mha",
        builder=SlidingWindowAttention,
        width="embed_dim",
        settings={
            "embed_dim": COUNT,
            "num_heads": COUNT,
            "num_heads_kv": Setting("null or num_heads", lambda v: v is None or _is_int(v), False),
            "cross_attn": _only(False),
            "qkv_proj_bias": FLAG,
            "out_proj_bias": FLAG,
            "dropout": DROPOUT,
            "softmax_scale": SCALE,
            "causal": _only(False),
            "layer_idx": UNREAD,
            "dwconv": _only(False),
            "rotary_emb_dim": _only(0),
            "rotary_emb_base": UNREAD,
            "rotary_emb_scale_base": UNREAD,
            "rotary_emb_interleaved": UNREAD,
            "window_size": WINDOW,
            "fused_bias_fc": HINT,
            "use_flash_attn": HINT,
            "return_residual": _only(False),
            "checkpointing": HINT,
            "device": HINT,
            "dtype": HINT,
        },
        required=frozenset({"embed_dim", "num_heads"}),
        tensors=frozenset({"Wqkv.weight", "out_proj.weight"}),
        optional_tensors=frozenset({"Wqkv.bias", "out_proj.bias"}),
        inherits={
            "Wqkv.weight": "qkv.weight",
            "Wqkv.bias": "qkv.bias",
            "out_proj.weight": "proj.weight",
            "out_proj.bias": "proj.bias",
        },
    ),
    # hyena_se takes the length of both filters from short_filter_order
    "hyena_se": _hyena(HyenaSE, _SHORT | _INNER, inner_filter_len=_UNREAD_LENGTH),
    "hyena_x": _hyena(HyenaX, _SHORT, inner_filter_len=_UNREAD_LENGTH),
    "hyena_y": _hyena(HyenaY, _INNER, inner_filter_len=COUNT, short_filter_order=_UNREAD_LENGTH),
    "mamba2": OperatorSpec(
        slot="mha",
        builder=Mamba2,
        width="d_model",
        settings={
            "d_model": COUNT,
            "d_state": COUNT,
            "d_conv": COUNT,
            "expand": COUNT,
            "headdim": COUNT,
            "chunk_size": COUNT,
            "ngroups": COUNT,
            "rmsnorm": FLAG,
            "norm_before_gate": FLAG,
            "bias": FLAG,
            "conv_bias": FLAG,
            "D_has_hdim": FLAG,
            "dt_limit": DT_LIMIT,
        },
        required=frozenset({"d_model"}),
        tensors=frozenset(
            {"dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "out_proj.weight"}
        ),
        optional_tensors=frozenset({"conv1d.bias", "norm.weight", "in_proj.bias", "out_proj.bias"}),
    ),
    "mlp": OperatorSpec(
        slot="mlp",
        builder=build_mlp,
        width="d_model",
        settings={"d_model": COUNT, "expansion_ratio": RATIO, "dropout": DROPOUT},
        required=frozenset({"d_model"}),
        tensors=frozenset({"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}),
        inherits={name: name for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")},
    ),
    "mlp_hyena_x": OperatorSpec(
        slot="mlp",
        builder=MlpHyenaX,
        width="d_model",
        settings=_HYENA | {"expansion_ratio": COUNT, "inner_filter_len": _UNREAD_LENGTH},
        required=frozenset({"d_model", "l_max"}),
        tensors=frozenset(_HYENA_TENSORS | _SHORT),
    ),
}


def build_operator(name: str, **config) -> nn.Module:
    """Builds one operator, [B,T,D] -> [B,T,D], with its published initialisation.

    `config` holds the keys of the operator's published YAML. ValueError for an unknown operator, an
    unknown or missing key, or a value that is not supported, naming the legal ones.
    """
    spec = _checked_spec(name, config)
    missing = sorted(spec.required - config.keys())
    if missing:
        raise ValueError(f"{name}: {', '.join(missing)} missing from the configuration")
    return spec.builder(**_passed(spec, config))


def complete_config(
    name: str, config: dict, *, hidden_size: int, num_heads: int, num_tokens: int
) -> dict:
    """All arguments of the operator's constructor that `config` comes to in a model, as plain data.

    Widths that `config` leaves out are the model's, other settings the defaults; what has no effect
    is dropped. Configurations that build the same operator in other words give the same result.

    ValueError when a value is not supported, when a given width is not `hidden_size`, or when the
    operator cannot run on `num_tokens` tokens or with these head sizes.
    """
    spec = _checked_spec(name, config)
    full = dict(config)
    width = full.setdefault(spec.width, hidden_size)
    if width != hidden_size:
        raise ValueError(
            f"{name}: {spec.width} {width} differs from the model's hidden size {hidden_size}: "
            f"set it to {hidden_size} or leave it out"
        )
    if name in ("mha", "swa"):
        heads = full.setdefault("num_heads", num_heads)
        _checked_spec(name, full)  # num_heads_kv against the filled-in num_heads
        if hidden_size % heads:
            raise ValueError(
                f"{name}: num_heads {heads} does not divide the model's hidden size "
                f"{hidden_size}: choose a divisor, or leave it out for the model's {num_heads}"
            )
    elif name == "mlp_hyena_x":
        l_max = full.setdefault("l_max", num_tokens)
        if l_max != num_tokens:
            raise ValueError(
                f"mlp_hyena_x: l_max {l_max} differs from the model's {num_tokens} tokens: set it "
                f"to {num_tokens} or leave it out"
            )
    elif name in ("hyena_se", "hyena_x", "hyena_y"):
        _check_filter(name, config)
        l_max = full.setdefault("l_max", HYENA_L_MAX)
        if l_max < num_tokens:
            raise ValueError(
                f"{name}: l_max {l_max} is less than the model's {num_tokens} tokens: set it to "
                f"{num_tokens} or more, or leave it out"
            )
    given = _passed(spec, full)
    arguments = {
        key: _plain(given.get(key, parameter.default))
        for key, parameter in inspect.signature(spec.builder).parameters.items()
    }
    with torch.device("meta"):
        spec.builder(**arguments)  # raises where sizes do not divide
    return arguments


def _checked_spec(name: str, config: dict) -> OperatorSpec:
    if name not in OPERATORS:
        raise ValueError(f"unknown operator {name!r}: choose one of {', '.join(OPERATORS)}")
    spec = OPERATORS[name]
    for key, value in config.items():
        if key not in spec.settings:
            raise ValueError(
                f"{name}: unknown key {key!r} (value {value!r}){_whose(config)}; legal keys are "
                f"{', '.join(spec.settings)}"
            )
        if not spec.settings[key].accepts(value):
            raise ValueError(
                f"{name}: {key} {value!r} is not supported; legal is {spec.settings[key].legal}"
            )
        if spec.settings[key].hint and value not in (None, False):
            _note_hint(name, key)
    kv_heads, heads = config.get("num_heads_kv"), config.get("num_heads")
    if kv_heads is not None and heads is not None and kv_heads != heads:
        raise ValueError(
            f"{name}: num_heads_kv {kv_heads} is not supported; legal is null or num_heads {heads}"
        )
    return spec


def _check_filter(name: str, config: dict) -> None:
    """Refuses what names the length of the filter that a Hyena operator lacks, and not of its own.

    Such is the file of another Hyena operator; files with both lengths serve for all.
    """
    lengths = ["short_filter_order", "inner_filter_len"]
    own, other = lengths if name != "hyena_y" else lengths[::-1]
    if other in config and own not in config:
        raise ValueError(
            f"{name}: {other} without {own} is the configuration of another Hyena operator: name "
            f"the file of {name}, or set {own}"
        )


def _whose(config: dict) -> str:
    """The operators that a configuration of unfit keys is for, as a remark."""
    found = [
        n for n, s in OPERATORS.items() if s.width in config and config.keys() <= s.settings.keys()
    ]
    named = " or ".join(f"{name} ({OPERATORS[name].slot} slot)" for name in found)
    return f": these are the keys of {named}" if found else ""


def _passed(spec: OperatorSpec, config: dict) -> dict:
    return {key: value for key, value in config.items() if spec.settings[key].passed}


def _plain(value):
    """Lists for tuples and None for no bound, so that files give back what was stored in them."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if value == math.inf else value


@cache
def _note_hint(name: str, key: str) -> None:
    """Once a process; a warning, as only these show where nobody has set up logging."""
    logger.warning("%s: %s is a hint for other kernels and has no effect here", name, key)
