"""Presets: which widths, scale rules and encoder options a `--kv-cache-dtype` name stands for."""

from dataclasses import dataclass

KEY_BITS = (8, 5, 4, 3, 2)
VALUE_BITS = (8, 4, 3, 2)
TRELLIS_BITS = (3, 2)
SCALE_RULES = ("norm", "unbiased", "raw")
TRELLIS = 16  # a code width of TRELLIS + b is b bits a coordinate, trellis-coded (core/trellis.py)

# Multipliers of the unit-variance scale that the encoder tries for every vector; it keeps the one whose codes point
# closest to the vector. Costs time on write only: nothing about it is stored. Tuned on Gaussian vectors for all widths
# together: at 2, 3, 4, 5 bits 1 - cosine^2 falls by 1.7, 9.9, 21 and 26 % (head_dim 64), .8, 5.5, 14 and 20 % (128).
SCALE_SEARCH = (1.0, 0.95, 0.9, 0.85, 0.81, 0.76, 1.06, 1.15, 1.28)

# The same for trellis codes, which choose by open paths (core/trellis.py): 2.0 and 8.6 % at 2 and 3 bits (64), 1.0 and
# 5.3 % (128).
TRELLIS_SCALE_SEARCH = (1.0, 0.92, 0.85, 1.1, 1.28)


class UnknownPresetError(ValueError):
    """A `--kv-cache-dtype` of the turboquant family that names no preset."""


@dataclass(frozen=True)
class TurboQuantConfig:
    """What a preset fixes: together with the head size this determines every byte of the cache.

    Attributes:
        name: the `--kv-cache-dtype` string.
        key_bits, value_bits: code width of one coordinate, bits.
        key_scale_rule, value_scale_rule: what the stored scale makes exact. "norm": the decoded vector has the length
            of the original; "unbiased": the decoded vector's inner product with the original is the squared norm
            (EDEN); "raw": TurboQuant Alg. 1 as printed.
        scale_search: multipliers tried by the encoder; `(1.0,)` turns the search off.
        trellis: codes are trellis-coded, keys and values alike.
        key_offset: subtract what a layer's keys have in common, rotated by RoPE: the bias of the key projection where
            the checkpoint has one, and else the mean of a fixed pass.
        recent_tokens: the newest tokens of a sequence, so many, are also kept in RECENT_PRESET and read from there.
        key_sketch: keys also have one sign a coordinate of a sketch of what their codes miss, and its norm: the prod
            variant of the paper (TurboQuant Alg. 2), of key_bits + 1 bits. Scores become unbiased, and noisier.
    """

    name: str
    key_bits: int
    value_bits: int
    key_scale_rule: str = "norm"
    value_scale_rule: str = "norm"
    scale_search: tuple[float, ...] = SCALE_SEARCH
    trellis: bool = False
    key_offset: bool = True
    key_sketch: bool = False
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        for what, got, allowed in (
            ("key_bits", self.key_bits, TRELLIS_BITS if self.trellis else KEY_BITS),
            ("value_bits", self.value_bits, TRELLIS_BITS if self.trellis else VALUE_BITS),
            ("key_scale_rule", self.key_scale_rule, SCALE_RULES),
            ("value_scale_rule", self.value_scale_rule, SCALE_RULES),
        ):
            if got not in allowed:
                raise ValueError(f"{what} of preset {self.name!r}: got {got!r}, allowed {allowed}.")
        if self.key_sketch and (self.key_bits != 3 or self.trellis):
            how = ", trellis-coded" if self.trellis else ""
            raise ValueError(f"key_sketch of preset {self.name!r}: got {self.key_bits} key bits{how}, allowed 3.")
        if not self.scale_search or min(self.scale_search) <= 0:
            raise ValueError(f"scale_search of preset {self.name!r}: got {self.scale_search}, allowed numbers above 0.")

    @property
    def key_width(self) -> int:
        """Code width of keys as format.PLANES lists it: key_bits, plus TRELLIS for trellis codes."""
        return self.key_bits + TRELLIS * self.trellis

    @property
    def value_width(self) -> int:
        """The same of values."""
        return self.value_bits + TRELLIS * self.trellis

    @property
    def key_label(self) -> str:
        """Bits of a key's coordinate, for people: "4", or "3+1" where one of them is a sign of the sketch."""
        return f"{self.key_bits}+1" if self.key_sketch else str(self.key_bits)


RECENT_PRESET = "turboquant:k8v8"  # what the newest tokens are kept in, where a preset has recent_tokens


def _preset(suffix: str, key_bits: int, value_bits: int, **options) -> TurboQuantConfig:
    return TurboQuantConfig(f"turboquant{suffix}", key_bits, value_bits, **options)


def _trellis_preset(suffix: str, bits: int) -> TurboQuantConfig:
    return TurboQuantConfig(f"turboquant{suffix}", bits, bits, scale_search=TRELLIS_SCALE_SEARCH, trellis=True)


PRESETS: dict[str, TurboQuantConfig] = {
    config.name: config
    for config in (
        _preset("", 4, 4),
        _preset(":k8v8", 8, 8),
        _preset(":k8v4", 8, 4),
        _preset(":k5v4", 5, 4),
        _preset(":k4v4", 4, 4),
        _preset(":k4v3", 4, 3),
        _preset(":k3v3", 3, 3),
        _preset(":k3v2", 3, 2),
        _preset(":k2v2", 2, 2),
        _trellis_preset(":t3", 3),
        _trellis_preset(":t2", 2),
        _preset(":prod", 3, 4, key_sketch=True),
        _preset(":k4v4-r128", 4, 4, recent_tokens=128),
        _preset(":k3v3-r128", 3, 3, recent_tokens=128),
    )
}


def get_config(name: str) -> TurboQuantConfig:
    """Return the preset called `name`.

    Raises:
        UnknownPresetError: no such preset; the message lists those that exist.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise UnknownPresetError(
            f"Unknown TurboQuant preset: got {name!r}, allowed {', '.join(PRESETS)}. "
            f"Use --kv-cache-dtype turboquant if in doubt."
        ) from None
