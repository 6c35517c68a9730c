"""What llama.cpp's types take when a token is written."""

from __future__ import annotations

from collections.abc import Mapping

from tersor.engines.contract import Pace

PACE: Mapping[str, Pace] = {
    "q4_0": Pace(11.0, 0.0, 6.3),
    "iq4_nl": Pace(10.2, 0.0, 7.2),
    "q4_k": Pace(11.4, 0.0, 3.6),
    "q2_k": Pace(6.4, 0.0, 10.3),
    "q4_1": Pace(18.6, 12.3, 0.0),
    "q5_0": Pace(19.0, 13.2, 0.0),
    "q5_1": Pace(19.5, 13.0, 0.9),
    "q8_0": Pace(21.6, 10.4, 0.3),
    "q3_k": Pace(4.3, 24.1, 7.5),
    "q5_k": Pace(20.1, 12.9, 0.0),
    "q6_k": Pace(10.5, 17.8, 4.0),
    "iq4_xs": Pace(18.8, 8.5, 1.5),
    "iq2_xxs": Pace(20.9, 20.3, 1.6),
    "iq2_xs": Pace(25.1, 16.4, 1.4),
    "iq2_s": Pace(26.6, 10.2, 1.0),
    "iq3_xxs": Pace(39.1, 6.0, 2.0),
    "iq3_s": Pace(37.7, 27.7, 1.9),
    "tq1_0": Pace(10.6, 11.9, 0.7),
    "tq2_0": Pace(0.0, 15.2, 3.8),
    "bf16": Pace(43.4, 6.0, 0.0),
    "fp16": Pace(45.0, 5.9, 0.0),
}
"""On two cores of a Zen 4, by benchmarks/pace.py (benchmarks/results/pace.md has what was measured, and the errors).

The first four are those that llama.cpp interleaves as it loads them: half the time for a weight, none for a row, but
some microseconds for each product.
"""
