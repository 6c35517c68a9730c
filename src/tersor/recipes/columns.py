"""Structure in the columns: salient input channels kept finer, column factors, and n of m weights kept."""

from __future__ import annotations

from functools import partial

from tersor.contracts import Shape
from tersor.recipes.fit import fullest, grouped, largest
from tersor.recipes.recipe import Claim, NothingFits, Paper
from tersor.recipes.registry import recipe
from tersor.recovery import BlockTuning
from tersor.solvers import ErrorFeedback


def _salient(bits: float, shape: Shape, rest: str) -> str:
    """As many salient columns at 4 bits as fit, the rest binary."""
    if bits > 3:
        raise NothingFits(f"Binary weights with salient columns are for up to 3 bits; {bits:.3f} were given.")
    found = largest(lambda count: f"cols(int4:row,{rest}):{count}:inputs", shape[1] - 1, bits, shape)
    if found is None:
        raise NothingFits(
            f"Not one salient column of a layer of {shape[0]} x {shape[1]} fits {bits:.3f} bits a weight."
        )
    return found


def _half(bits: float, shape: Shape, *, pattern: str) -> str:
    kept = shape[1] // 2
    return fullest(
        [text for width in range(2, 9) for text in grouped(f"sparse{pattern}(int{width}:{{}})", kept)], bits, shape
    )


_PTQ161 = Paper(
    "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large Language Models",
    "2502.13179",
    "S161",
)
_LEARNED = BlockTuning(steps=48, checks=1, mixed=True)

recipe(
    name="ptq161",
    paper=_PTQ161,
    summary="Large input channels at 4 bits, all others signs times row and column factors; factors learned by block.",
    codec=partial(_salient, rest="colscale(bin:row)"),
    solver=ErrorFeedback,
    tune=_LEARNED,
    needs=("cols(int4:row,colscale(bin:row)):0.2:inputs",),
    differs=(
        "As many salient channels as the budget allows, 20 % in the paper. Factors begin as least squares under each "
        "layer's Gram matrix; block by block they are learned on the squared error alone, not on the negative log "
        "cosine of each token too. Codes come by error feedback, binary channels before salient ones. Weights are not "
        "reshaped by restorative LoRA before."
    ),
    claims=(
        Claim("At no more than 1.8 bits it beats partial binarization at equal bytes.", "pb-llm", (1.5,)),
        Claim("So it does at 2.25 bits.", "pb-llm", (2,)),
        Claim("Column factors improve on row factors alone.", "ptq161-rows", (1.5, 2)),
    ),
)

recipe(
    name="ptq161-rows",
    paper=_PTQ161,
    summary="PTQ1.61 without column factors, and more salient channels for what those took.",
    codec=partial(_salient, rest="bin:row"),
    solver=ErrorFeedback,
    tune=_LEARNED,
    needs=("cols(int4:row,bin:row):0.2:inputs",),
    differs="An ablation: row factors alone, otherwise as in ptq161.",
)

_SPARSE_GPT = Paper("SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "2301.00774")

recipe(
    name="sparsegpt",
    paper=_SPARSE_GPT,
    summary="Half the weights kept, refitted by least squares and rounded with error feedback.",
    codec=partial(_half, pattern="8of16"),
    solver=ErrorFeedback,
    needs=("sparse8of16(int4:row)",),
    differs=(
        "Eight of every 16 weights of a row are kept, which takes 0.875 bits a weight; the paper keeps half of a block "
        "of 128 columns, with a bit for each. It chooses and corrects one such block after the other; here one weight "
        "of every 16 goes at a time, and the whole row is refitted before the next."
    ),
    claims=(Claim("Half the weights at 4 bits beat all of them at 3 bits, positions counted.", "gptq", (3,)),),
)

recipe(
    name="sparsegpt-2of4",
    paper=_SPARSE_GPT,
    summary="SparseGPT with two of every four weights: what a pattern that engines run costs.",
    codec=partial(_half, pattern="2of4"),
    solver=ErrorFeedback,
    needs=("sparse2of4(int4:row)",),
    differs="Positions take 0.75 bits a weight; otherwise as sparsegpt. The paper claims this of no pattern so narrow.",
    claims=(Claim("Half the weights at 4 bits, two of every four, beat all of them at 3 bits.", "gptq", (3,)),),
)
