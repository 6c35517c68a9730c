"""Error feedback for inputs whose tokens count by the loss's gradients: what ``tersor compress`` does."""

from __future__ import annotations

from tersor.recipes.baselines import gptq, refitted, uniform
from tersor.recipes.recipe import Claim, Paper
from tersor.recipes.registry import recipe
from tersor.recipes.vectors import entropy_coded, trellis
from tersor.solvers import CoordinateDescent, ErrorFeedback

_DIFFERS = (
    "One matrix for all layers that read an input, tokens weighted by all of them; the paper has some for each layer."
)

recipe(
    name="guided-gptq",
    paper=Paper("GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance", "2505.07004"),
    summary="GPTQ with a Gram matrix in which each token counts by the loss's gradient.",
    codec=uniform,
    solver=gptq,
    guided=True,
    differs=_DIFFERS,
    claims=(Claim("End-loss guidance improves on the layer's own output error.", "gptq", (2, 3, 4)),),
)

recipe(
    name="guided-refit",
    paper=Paper("Our default for integers: coordinate descent and refitted scales, tokens weighted by gradients"),
    summary="What tersor compress does with plain integers.",
    codec=refitted,
    solver=CoordinateDescent,
    guided=True,
    differs="Not a paper's.",
    claims=(Claim("End-loss guidance improves on feedback-refit.", "feedback-refit", (2, 3, 4)),),
)

recipe(
    name="guided-trellis",
    paper=Paper("Our default: a rotated trellis, tokens weighted by gradients"),
    summary="What tersor compress does with most layers, with a longer window.",
    codec=trellis,
    solver=ErrorFeedback,
    guided=True,
    needs=("rot(trellis2:L12)",),
    differs="Not a paper's.",
    claims=(Claim("End-loss guidance improves on the trellis alone.", "qtip", (2, 3, 4)),),
)

recipe(
    name="guided-ectcq",
    paper=Paper("Our smallest files: entropy-coded trellises, tokens weighted by gradients"),
    summary="Trellises whose codes are entropy coded, and whose solver minds what tokens are worth.",
    codec=entropy_coded,
    solver=ErrorFeedback,
    guided=True,
    needs=("ectcq2",),
    differs="Not a paper's.",
    claims=(Claim("End-loss guidance improves on ectcq alone.", "ectcq", (2, 3, 4)),),
)
