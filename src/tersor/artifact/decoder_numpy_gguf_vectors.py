"""Decode llama.cpp's tensor types with grids (``iq2_xxs`` … ``iq3_s``) with NumPy alone; see ``SPEC.md``."""

from __future__ import annotations

import zlib
from base64 import b85decode
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

POINTS = {
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
"""A bit for each possible point of a grid: whether the grid has it. Deflated, in base 85."""

THREE = (8, 25, 43)
MAGNITUDES = {
    "iq2_xxs": THREE,
    "iq2_xs": THREE,
    "iq2_s": THREE,
    "iq3_xxs": (4, 12, 20, 28, 36, 44, 52, 62),
    "iq3_s": (1, 3, 5, 7, 9, 11, 13, 15),
}
BYTES = {"iq2_xxs": 66, "iq2_xs": 74, "iq2_s": 82, "iq3_xxs": 98, "iq3_s": 110}
FACTOR = {"iq2_xxs": 0.25, "iq2_xs": 0.25, "iq2_s": 0.25, "iq3_xxs": 0.5, "iq3_s": 2.0}
HEAD = "|".join(BYTES)
BLOCK = 256


def parts(text: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name to (dtype, shape) for a weight ``(rows, columns)``. Raises ValueError for what cannot be."""
    if text not in BYTES:
        raise ValueError(f"codec '{text[:80]}' has options, which {HEAD.replace('|', ', ')} have not")
    if columns % BLOCK:
        raise ValueError(f"blocks of {BLOCK} do not divide {columns} columns")
    return {"blocks": ("U8", (rows, columns // BLOCK * BYTES[text]))}


def decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The float32 weight ``(rows, columns)``.

    >>> block = np.array([[0, 0x3C, *[0] * 96]], np.uint8)        # d = 1, point 0, no negative sign, step 0
    >>> decode("iq3_xxs", {"blocks": block}, 1, 256)[0, :3].tolist()
    [1.0, 1.0, 1.0]
    """
    parts(text, rows, columns)
    blocks = arrays["blocks"].reshape(-1, BYTES[text])
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    point, signs, step = read(text, blocks[:, 2:])
    scale = d * ((step.astype(np.float32) + np.float32(0.5)) * np.float32(FACTOR[text]))
    vectors = grid(text)[point].reshape(len(blocks), -1, 8)
    negative = signs[:, :, None] >> np.arange(8) & 1
    unit = np.where(negative == 1, -vectors, vectors).reshape(len(blocks), scale.shape[1], -1)
    weight: Array = unit * scale[:, :, None]
    return weight.reshape(rows, columns)


@lru_cache(maxsize=8)
def grid(text: str) -> Array:
    """All points ``(n, 8)`` or ``(n, 4)``; the first coordinate's digit is the least."""
    magnitudes = np.array(MAGNITUDES[text], np.float32)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(b85decode(POINTS[text])), np.uint8), bitorder="little")
    dims = 4 if text.startswith("iq3") else 8
    numbers = np.flatnonzero(bits)[:, None]
    points: Array = magnitudes[numbers // len(magnitudes) ** np.arange(dims) % len(magnitudes)]
    return points


def read(text: str, stream: Array) -> tuple[Array, Array, Array]:
    """Points, eight signs for every eight weights, and steps, of what follows ``d`` in blocks ``(n, bytes)``."""
    wide = stream.astype(np.int64)
    if text == "iq2_xxs":
        pairs = wide.reshape(len(wide), 8, 8)
        signs, step = words(pairs[:, :, 4:])
        return pairs[:, :, :4].reshape(len(wide), 32), signs, step
    if text == "iq2_xs":
        pair = wide[:, 0:64:2] | wide[:, 1:64:2] << 8
        return pair & 511, last_sign(pair >> 9), spread(wide[:, 64:], 4)
    if text == "iq2_s":
        return wide[:, :32] | spread(wide[:, 64:72], 2) << 8, wide[:, 32:64], spread(wide[:, 72:], 4)
    if text == "iq3_xxs":
        signs, step = words(wide[:, 64:].reshape(len(wide), 8, 4))
        return wide[:, :64], signs, step
    return wide[:, :64] | spread(wide[:, 64:72], 1) << 8, wide[:, 72:104], spread(wide[:, 104:], 4)


def spread(stream: Array, bits: int) -> Array:
    """Numbers of ``bits`` bits, the lowest of a byte first."""
    numbers: Array = stream[:, :, None] >> np.arange(0, 8, bits) & 2**bits - 1
    return numbers.reshape(len(stream), -1)


def words(four: Array) -> tuple[Array, Array]:
    """Signs and steps of words ``(n, 8, 4)``: four times seven sign bits, and four bits of step."""
    word = (four << np.arange(0, 32, 8)).sum(2)
    seven = word[:, :, None] >> np.arange(0, 28, 7) & 127
    return last_sign(seven.reshape(len(four), 32)), word >> 28


def last_sign(seven: Array) -> Array:
    """Eight sign bits of seven: an even number is set."""
    signs: Array = seven | (seven[:, :, None] >> np.arange(7) & 1).sum(2) % 2 << 7
    return signs
