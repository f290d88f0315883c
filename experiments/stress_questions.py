"""The questions of the stress test, with hypotheses and predictions that were written before their runs.

A question is asked of both mechanisms with the same seeds, and each run is at least 1,500 steps long.
Questions come in order of importance. `experiments/stress_plan.py` prints them with what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.cell_transformer import MECHANISMS
from experiments.run_config import RunConfig


@dataclass(frozen=True)
class Question:
    """One thing to find out.

    Attributes:
        name: Of its runs, too.
        session: Lease in which it is asked.
        hypothesis: What is thought, and why.
        prediction: What will be seen if that is so.
        changes: Fields of `RunConfig` that differ from its defaults.
        seeds: One pair of runs, softmax and sigmoid, for each.
        takes_whole_gpu: Whether a run of it shares its GPU with no other where there are several GPUs.
        may_be_cut: Whether the runs begin even if the lease cannot see their end; they count as far as they
            get.
    """

    name: str
    session: int
    hypothesis: str
    prediction: str
    changes: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    takes_whole_gpu: bool = False
    may_be_cut: bool = False

    def runs(self) -> list[RunConfig]:
        """The question's runs, the two of one seed beside each other."""
        return [
            RunConfig(f"{self.name}-{mechanism}-seed{seed}", mechanism, seed=seed, **self.changes)
            for seed in self.seeds
            for mechanism in MECHANISMS
        ]


# The defaults of RunConfig are the regime of the best lead in SCIENCE.md, section 4, but for its batch:
# rank-encoded real cells, pre-LN, GPT-2 initialisation, rate 1e-3, 100 steps of warm-up, β₂ 0.999, weight
# decay 0.01, no clipping.
QUESTIONS: tuple[Question, ...] = (
    Question(
        "lead",
        1,
        "Softmax rows collapse layer by layer, their logits grow, and gradients grow with them; sigmoid "
        "has no rows that could collapse onto one key.",
        "Softmax: median gradient norm rises from step 1,000 on, spikes above 30 x the median of steps "
        "100-300, entropy below 0.1 nats in layer 1 first; no sustained factor of 1e4. Sigmoid: no spike "
        "above 10 x, validation loss lower by 0.1 nats and more.",
        {"batch_size": 4, "steps": 6000},
        takes_whole_gpu=True,
        may_be_cut=True,
    ),
    Question(
        "healthy-ranks",
        1,
        "Clipped at 1 and at a moderate rate both mechanisms learn the task, so that what goes wrong "
        "elsewhere is the regime's fault and not the harness's.",
        "Validation cross-entropy at least 0.3 nats below the unigram one, 6 of 6 runs. (Unigram 9.207; "
        "leaving out the genes that a cell shows and guessing by frequency would reach 7.94.)",
        {"learning_rate": 5e-4, "schedule": "cosine", "clip_norm": 1.0, "batch_size": 2, "steps": 2000},
        seeds=(0, 1, 2),
    ),
    Question(
        "rate-1e-3",
        1,
        "The lead's rate at a quarter of its batch: noisier gradients, the same collapse.",
        "No explosion; softmax's largest sustained factor is 2 to 10 times sigmoid's.",
        {"learning_rate": 1e-3},
        seeds=(0, 1, 2),
    ),
    Question(
        "rate-3e-3",
        1,
        "Between the two lies softmax's largest stable rate, and not yet sigmoid's.",
        "Softmax fails to learn in at least 2 of 3 seeds, sigmoid learns in at least 2 of 3.",
        {"learning_rate": 3e-3},
        seeds=(0, 1, 2),
    ),
    Question(
        "no-warm-up-1e-3",
        2,
        "Without warm-up Adam's first full-size steps throw the weights far out for both alike; what follows "
        "depends on where they land.",
        "A first-steps transient of 2 to 4 orders in both, over within 10 steps; afterwards as rate-1e-3.",
        {"warmup_steps": 0, "learning_rate": 1e-3},
        seeds=(0, 1, 2),
    ),
    Question(
        "rate-1e-2",
        2,
        "Ten times the rate drives both out of health: softmax to one-hot rows, sigmoid to saturation.",
        "Neither learns (both within 0.05 nats of the unigram loss). Softmax's level after step 300 is 1 "
        "to 2 orders above sigmoid's; neither reaches a sustained 1e4.",
        {"learning_rate": 1e-2},
        seeds=(0, 1, 2),
    ),
    Question(
        "no-warm-up-1e-2",
        2,
        "As before, at the rate where sixteen short runs of regression came nearest to an explosion.",
        "Softmax's median gradient norm is 1 to 2 orders above sigmoid's; no healthy baseline in either, "
        "so no explosion by the definition.",
        {"warmup_steps": 0, "learning_rate": 1e-2},
        seeds=(0, 1, 2),
    ),
    Question(
        "healthy-values",
        2,
        "The same of masked-value regression.",
        "Explained variance above 0.2, 6 of 6 runs. (Each gene's mean alone explains 0.67.)",
        {"task": "values", "learning_rate": 3e-4, "clip_norm": 1.0},
        seeds=(0, 1, 2),
    ),
    Question(
        "bfloat16-weights",
        2,
        "Weights and moments in bfloat16 lose the small updates that keep logits in bounds.",
        "Both learn more slowly than rate-1e-3; softmax's max logit grows no faster. No explosion.",
        {"precision": "bfloat16"},
    ),
    Question(
        "init-0.1",
        2,
        "Five times GPT-2's standard deviation is 25 times the logits at the start: softmax begins "
        "collapsed, sigmoid begins saturated where its bias does not hold.",
        "Softmax's first-steps transient exceeds sigmoid's by an order; neither learns in 1,500 steps.",
        {"model": {"init_std": 0.1}},
    ),
    Question(
        "beta2-0.9999",
        2,
        "A long second moment lags behind growing gradients: larger relative updates at every spike.",
        "Softmax's spikes grow (largest factor above that of rate-1e-3, seed 0), sigmoid's do not.",
        {"betas": (0.9, 0.9999)},
    ),
    Question(
        "beta2-0.95",
        2,
        "A short second moment follows the gradients and so damps spikes (Wortsman et al. 2304.13013).",
        "Fewer factors above 10 than rate-1e-3, seed 0, in softmax; no change in sigmoid.",
        {"betas": (0.9, 0.95)},
    ),
    Question(
        "eps-1e-15",
        2,
        "With gradients of 0.2 over 160 million weights, ε = 1e-8 matters for the smallest entries alone.",
        "No difference from rate-1e-3, seed 0, in either mechanism.",
        {"eps": 1e-15},
    ),
    Question(
        "post-ln",
        2,
        "Post-LN gradients grow towards the output at the start (Xiong et al. 2002.04745): less room for a "
        "collapsed layer.",
        "Softmax stops learning (within 0.05 nats of unigram); sigmoid may as well. No sustained 1e4.",
        {"model": {"norm_position": "post"}},
    ),
    Question(
        "deep",
        2,
        "21 layers of 768 in place of 12 of 1,024: gains multiply over more layers.",
        "Softmax's largest factor is 3 times that of rate-1e-3, seed 0, or more; sigmoid's is not.",
        {"model": {"num_layers": 21, "embed_dim": 768, "num_heads": 12}},
    ),
    Question(
        "length-512",
        2,
        "Short rows collapse less: entropy starts at 6.2 nats in place of 9.0, and b = −ln n is smaller.",
        "Softmax and sigmoid differ less than in rate-1e-3, seed 0, in gradient factor and in loss.",
        {"tokens": 512, "batch_size": 16},
    ),
    Question(
        "heavy-tails",
        2,
        "Counts as targets: a few cells carry nearly all of the gradient, whatever the mechanism.",
        "Spikes of 2 orders above the median in both; explained variance lower than in healthy-values.",
        {"task": "counts"},
    ),
    # Added after the first 26 runs (docs/results/2026-11-22-stress-160m.md), before any run of these.
    Question(
        "values-1e-3",
        3,
        "Ranks are hardly learned in 1,500 steps, so a calm mechanism cannot show there that it learns as "
        "well. Values are learned, and softmax's rows collapse at the same rates.",
        "Both explain more than 0.5 of the variance in 3 of 3 seeds; softmax has single steps of 1 to 2 "
        "orders, sigmoid of less than 1; no explosion. The gradients of sigmoid's query projections fall "
        "below a hundredth of softmax's.",
        {"task": "values", "learning_rate": 1e-3},
        seeds=(0, 1, 2),
    ),
    Question(
        "values-3e-3",
        3,
        "The same at the rate of the strongest regime so far.",
        "Neither mechanism passes the genes' means (0.67 of the variance) in 2 of 3 seeds; softmax has "
        "single steps of 2 orders and more; no explosion. Sigmoid has row sums above 512 in 3 of 3.",
        {"task": "values", "learning_rate": 3e-3},
        seeds=(0, 1, 2),
    ),
    # Added after 40 runs (docs/results/2026-11-22-stress-160m-stressors.md), before any run of these.
    Question(
        "rate-1e-3-again",
        3,
        "Spikes belong to learning: sigmoid heads of the first layers whose logits grow to thousands make "
        "them. Seen in 30 runs after the fact, so asked again of new seeds.",
        "Every sigmoid run that ends more than 0.02 nats below the unigram loss has a larger peak than every "
        "one that does not, and the median peak of those that learn is above that of softmax's.",
        {"learning_rate": 1e-3},
        seeds=(3, 4, 5, 6, 7, 8),
    ),
    # Added after 42 runs (docs/results/2026-11-23-stress-160m-lead.md), before any run of these. 4,400 steps
    # and not 6,000, so that both seeds share a lease of two GPUs; in the lead gradients grew from 3,100 on.
    Question(
        "lead-again",
        4,
        "Gradients grow with the collapse of softmax's rows, in one seed; sigmoid's MLPs are frozen as soon "
        "as attention has filled the residual stream.",
        "Softmax, 2 of 2: more than half of the layers end below 0.1 nats, the median gradient norm of the "
        "last thousand steps is more than 10 times that of the calmest thousand, single steps pass 2 orders, "
        "no sustained 1e4. Sigmoid, 2 of 2: no step after 1,000 above 10 x its median of steps 100-300, "
        "validation loss lower by 0.1 nats and more, ten or more MLPs at Adam steps below 1e-3.",
        {"batch_size": 4, "steps": 4400},
        seeds=(1, 2),
        takes_whole_gpu=True,
        may_be_cut=True,
    ),
    Question(
        "lead-forgets",
        4,
        "Adam's second moment keeps the gradients of the first steps, five orders above later ones, for "
        "thousands of steps: an Adam that forgets them sets sigmoid's MLPs free, and then its calm is that "
        "of a whole model or none.",
        "Sigmoid: no MLP at Adam steps below 1e-3; validation loss at step 3,000 below the lead's (8.98); "
        "single steps after 1,000 above 10 x its median of steps 100-300. Softmax: rows collapse as in the "
        "lead, not earlier by more than a thousand steps.",
        {"batch_size": 4, "steps": 3000, "betas": (0.9, 0.95)},
        takes_whole_gpu=True,
        may_be_cut=True,
    ),
)
