"""llama.cpp's tensor types with a code for 4 or 8 weights: their grids of magnitudes, and where the bits lie.

The grids are theirs (ggml-common.h; also in the Python package gguf), which nothing simpler generates. Each is a set of
points whose digits number the magnitudes of a coordinate; in ascending order, the first digit the least, they are the
codes. Here a bit for every possible point says whether it is in the set, deflated and in base 85.
"""

from __future__ import annotations

import zlib
from base64 import b85decode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tersor.codecs.gguf_layout import Field, Kind, fold, unfold

_POINTS = {
    "iq2_xxs": (
        "c-nPRORB^$43oj#tB`je2YP^R=KfcCw)5@K5e=lV<VbEmf91ogR%p3E0BR^O#16P=^@J3)+t0mx___f>P^zDolEn6;is&dxI!#Zg_{KuzkVd"
        "4Mw`?l*l~*(z5~c8Qj-!-YZym34v`$TQ4<4*~)dpL;rq|+W4irx`d$&)6^vGb7UkLBrzcFbHqcf>sMFwRxr;MTG;*}m%Qlby-@@TSk)X7om@"
        "@#uKQIjUUWQ&$2&y}*gX5TV=Bc|Cuh1wL(2Kn3A3Yj<N%;gblzhT7_jxp@MF=lA5st5R^Hl2J=^JV`E{Z0D^#$6R7"
    ),
    "iq2_xs": (
        "c-mc2TdsvL2pkgnkBRPwCicH3cK=&BJX-bM<{ZTW!^|+oxJIi-qkD|rsuaR~iB<*?x~C4>8J0pJW<V>X*vo#SY&(-c)w(<-fCU6QVt|)*=>o"
        "J=N8h~B3mmYKBw*Y)Ca<s*uvOak7T*la5<g=kAh?T96(5+bR(Mt@J=L5^n!u1sF+~=p=RjVCGbM+vDH*59tF!>kC`)-u3GzO}jM8X_r-*1yt"
        "ubG*&a^iqGs?p-do}D8x2NWXU?%O)=7t88q040RdJ=Ak)9T+$YBcFD31^6BC_W+mG1}iEA-T}Oj@u6-pQ1yByIl9%`W3mW#F%j~<yh(N0zSL"
        "~oH^Zy%}}tQx4=M73#xoc?jNErTmD?iDs40;(&MG>YYMNuDE=SK;cc#9vM%q_=>7msuqjC"
    ),
    "iq2_s": (
        "c-n1JU5W-F3~NE(E9iYHjPDBe{#V(wI=kPpE5rQ7#3X8F%Z9aF@G^(h-0EI3Em0|W3^QwctZ7zp0a8G#rYWS&oF&YfEj@sgh^u5FBBgC>LAk"
        "BEEtarKv-X}c)kMD5E9g)N*35uFS6j&;COQ!QC2=T0oAzp}=fs8f?3xctXeG?g^dQAA!2(KVP=j1x!<Qgx@l7F)Pu!TMd$m>{ZzEray(N$Az"
        "Rb24)#*U9zYZZF^+2!@EVQ9?ARiEH!J<ErE8usn4?()-BQhW*1pE<<S|Z6aT82aQO}QP4+el6zUY~*z7~Sl6pK?p!Q_DMIhH4w7?joIO9P^#"
        "Dw9CRS7mu8OBC|vDii4FoWN_zK9m?6y$}qXC*pyH_2f!)+bXep&HXz~CYasM7Fd3(JhmM~KIbkHJ7yU4;E692~{FNElHOf~Fzm+TBn!W(Jyj"
        "C6"
    ),
    "iq3_xxs": (
        "c-l=-F%H5o3_M%0RAmZ7_lgPeigaLyA4Q!IuVCbv_?)J2Rn;aw-<^~BWtxCXwzFx0%xW)eST<YW5KL&L;j#hAAHoX-c)&}FY<X@1m|7IGsjr"
        "X>q7@bAuHrcP3L2_`6x)_>^v5;&o?@Fdagv_Uo9H*utGOGEJ93R6P|L2rgx{U}Y-UnrS3sKYtPIbF!WdDS7|dsT<9UQCqzhJe8+4kK5km%Xv"
        "Hjm=J(sMgqk-e3v^zjTJayVggoDWMJzTWE4a0T)3l-9P!ydlNePrBA?Xny*@kmBo4W|8$?wEo20v5Uy_5"
    ),
    "iq3_s": (
        "c-k#d!AiqG5PdVu!e&pqA>uXNMyUCUt<-~hDT4SrX{pfmmf{D9Rs{Q#&TgE;z`Qr}-rMBob#A|%IbF{W(Id*&Lkwq!%0~0(%@Ao{OU0lD_x2"
        "OXCI^OquXIKLt}o^pYnG?L6&oz+9HeSVPSrN(A}t!YmF^Xmp*3Qy-5G8(e|b5Y-VC?q(AA>+32wuC)HmEXp@c1}PT|h83}iuXSwt^ePGkv?U"
        "+Lf3a_=1ov?9@{igP&9v4ypFswx3&TJZ@M2_=SuX>*z&qp%+CoXl)ge8!drA@5Agyn!FG+()?*sDei}n1QT95(J|p-wR7#Aht{0!Hx!aZfy;"
        "cl!bD4D3uqR(zW`GY5;6>@R{_|3X$jRqNR^eu)^e<Ll^vCYlKPU1;QQ+o$IB(hKom+bHx0SXmXXwyZnVo8~6jd#wQ>"
    ),
}  # fmt: skip
_THREE = (8, 25, 43)


@dataclass(frozen=True)
class GridKind(Kind):
    """A type with vectors. ``levels``: the number of points.

    ``magnitudes``: those a coordinate may have. ``dims``: coordinates. ``span``: weights with one code, one or two
    points and then a sign bit for each weight. ``even``: an even number is negative, and the last bit not stored.
    """

    magnitudes: tuple[int, ...] = ()
    dims: int = 8
    span: int = 8
    even: bool = False

    @property
    def bits(self) -> int:
        """Of the number of a point."""
        return (self.levels - 1).bit_length()

    @property
    def points(self) -> int:
        """In a span."""
        return self.span // self.dims

    @property
    def grid(self) -> Tensor:
        """All points ``(levels, dims)`` float32."""
        return _grid(self.name, self.magnitudes, self.dims)


_D = Field("d", 2)
GRIDS = {
    kind.name: kind
    for kind in (
        GridKind(
            "iq2_xxs", 256, 32, 256, 0, (_D, Field("mixed", 64)), (0, 15), shift=0.5, factor=0.25,
            magnitudes=_THREE, even=True,
        ),
        GridKind(
            "iq2_xs", 256, 16, 512, 0, (_D, Field("pairs", 64), Field("step", 8, 4, 1)), (0, 15), shift=0.5,
            factor=0.25, magnitudes=_THREE, even=True,
        ),
        GridKind(
            "iq2_s", 256, 16, 1024, 0,
            (_D, Field("point", 32), Field("signs", 32), Field("point", 8, 2, 1, shift=8), Field("step", 8, 4, 1)),
            (0, 15), shift=0.5, factor=0.25, magnitudes=_THREE,
        ),
        GridKind(
            "iq3_xxs", 256, 32, 256, 0, (_D, Field("point", 64), Field("words", 32)), (0, 15), shift=0.5, factor=0.5,
            magnitudes=(4, 12, 20, 28, 36, 44, 52, 62), dims=4, even=True,
        ),
        GridKind(
            "iq3_s", 256, 32, 512, 0,
            (_D, Field("point", 64), Field("point", 8, 1, 1, shift=8), Field("signs", 32), Field("step", 4, 4, 1)),
            (0, 15), shift=0.5, factor=2.0, magnitudes=(1, 3, 5, 7, 9, 11, 13, 15), dims=4, span=4,
        ),
    )
}  # fmt: skip


@lru_cache(maxsize=8)
def _grid(name: str, magnitudes: tuple[int, ...], dims: int) -> Tensor:
    packed = torch.frombuffer(bytearray(zlib.decompress(b85decode(_POINTS[name]))), dtype=torch.uint8)
    numbers = unfold(packed[None], 1, 1)[0].nonzero()
    digits = numbers // len(magnitudes) ** torch.arange(dims) % len(magnitudes)
    return torch.tensor(magnitudes, dtype=torch.float32)[digits]


def read(kind: GridKind, blocks: Tensor) -> dict[str, Tensor]:
    """What blocks ``(n, nbytes)`` uint8 hold: ``codes (n, block / span)`` int32, ``d`` and ``step`` float32."""
    found: dict[str, Tensor] = {}
    start = 0
    for field in kind.fields:
        stream = blocks[:, start : start + field.nbytes]
        start += field.nbytes
        if field.what == "d":
            found["d"] = stream.contiguous().view(torch.float16).to(torch.float32)
        elif field.what == "words":
            found["signs"], found["step"] = _read_words(_integers(stream, 4))
        elif field.what == "mixed":
            pairs = stream.reshape(len(stream), 8, 8)
            found["point"] = pairs[:, :, :4].flatten(1).to(torch.int32)
            found["signs"], found["step"] = _read_words(_integers(pairs[:, :, 4:].flatten(1), 4))
        elif field.what == "pairs":
            pair = _integers(stream, 2)
            found["point"], found["signs"] = (pair & 511).to(torch.int32), _last_sign(pair >> 9)
        else:
            part = unfold(stream, field.bits, field.stride).to(torch.int32) << field.shift
            found[field.what] = found.get(field.what, 0) + part
    step = (found["step"].to(torch.float32) + kind.shift) * kind.factor
    each = found["point"].reshape(len(blocks), kind.block // kind.span, kind.points)
    codes = (each << torch.arange(0, kind.bits * kind.points, kind.bits, device=each.device)).sum(2)
    signs = found["signs"].to(torch.int32)
    if kind.span == 4:
        signs = torch.stack([signs & 15, signs >> 4], 2).flatten(1)
    return {"codes": (codes | signs << kind.bits * kind.points).to(torch.int32), "d": found["d"], "step": step}


def write(kind: GridKind, numbers: Mapping[str, Tensor]) -> Tensor:
    """The inverse of :func:`read`: blocks ``(n, nbytes)`` uint8."""
    codes = numbers["codes"].to(torch.int32)
    signs = codes >> kind.bits * kind.points
    if kind.span == 4:
        signs = signs[:, 0::2] | signs[:, 1::2] << 4
    shifts = torch.arange(0, kind.bits * kind.points, kind.bits)
    step = (numbers["step"] / kind.factor - kind.shift).round().to(torch.int32)
    point = (codes[:, :, None] >> shifts & kind.levels - 1).flatten(1)
    whole = {"point": point, "signs": signs, "step": step}
    streams = []
    for field in kind.fields:
        if field.what == "d":
            streams.append(numbers["d"].to(torch.float16).contiguous().view(torch.uint8))
        elif field.what == "words":
            streams.append(_bytes(_write_words(signs, step), 4))
        elif field.what == "mixed":
            words = _bytes(_write_words(signs, step), 4).reshape(len(codes), 8, 4)
            streams.append(torch.cat([point.to(torch.uint8).reshape(len(codes), 8, 4), words], 2).flatten(1))
        elif field.what == "pairs":
            streams.append(_bytes(point.long() | (signs.long() & 127) << 9, 2))
        else:
            part = whole[field.what] >> field.shift & 2**field.bits - 1
            streams.append(fold(part, field.bits, field.stride))
    return torch.cat(streams, 1)


def parity(signs: Tensor) -> Tensor:
    """Whether an odd number of the lowest eight bits is set, 0 or 1."""
    folded = signs ^ signs >> 4
    folded = folded ^ folded >> 2
    return (folded ^ folded >> 1) & 1


def _last_sign(signs: Tensor) -> Tensor:
    """Eight sign bits of seven: the last makes their number even."""
    return signs | parity(signs) << 7


def _read_words(words: Tensor) -> tuple[Tensor, Tensor]:
    """Words ``(n, k)`` of four times seven sign bits and a step: signs ``(n, 4 k)``, steps ``(n, k)``."""
    signs = words[:, :, None] >> torch.arange(0, 28, 7, device=words.device) & 127
    return _last_sign(signs.flatten(1)), words >> 28


def _write_words(signs: Tensor, step: Tensor) -> Tensor:
    four = (signs & 127).long().reshape(len(signs), step.shape[1], 4)
    return (four << torch.arange(0, 28, 7)).sum(2) | step.long() << 28


def _integers(stream: Tensor, width: int) -> Tensor:
    """Little-endian integers of ``width`` bytes, int64."""
    each = stream.to(torch.int64).reshape(len(stream), stream.shape[1] // width, width)
    return (each << torch.arange(0, 8 * width, 8, device=stream.device)).sum(2)


def _bytes(integers: Tensor, width: int) -> Tensor:
    return (integers[:, :, None] >> torch.arange(0, 8 * width, 8) & 255).to(torch.uint8).flatten(1)
