"""Attention collapse that the loss does not show: one layer's query and key weights grow step by step.

A small causal language model on fused attention is trained twice from one seed. In the faulty run the query
and key weights of one block are multiplied by 1.08 at every step from step 110 on. Probes, attached alike to
both runs, show that block's entropy, largest logit and row Jacobian leave the others', while the loss stays
beside that of the clean run.

    python -m experiments.attention_collapse                           # about a minute on one CPU core
    python -m experiments.attention_collapse --block 3 --seed 1        # another block, other weights and data
    python -m experiments.attention_collapse --chains 4                # a task that needs attention more
    tensorboard --logdir runs/attention-collapse

Writes below --log-dir: TensorBoard events in `clean` and `faulty`, `summary.json` and
`attention_collapse.png`. What the output means: docs/attention-collapse.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import probes
from experiments.collapse_report import PairedRuns, conclusion, draw_figure, summary, summary_table
from experiments.command_line import (
    add_threads,
    experiment_parser,
    fail,
    positive_float,
    positive_int,
    progress_bar,
    report_console,
    run_facts,
    write_json,
)
from experiments.token_chains import chain_batches
from experiments.token_transformer import TokenTransformer, TokenTransformerConfig
from probes.reading import RecordedSeries, to_series

DEFAULT_LOG_DIR = Path("runs/attention-collapse")
LEARNING_RATE = 2e-3
BATCH_SIZE = 8


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        step: First step before which the weights are multiplied.
        block: Index of the block whose query and key weights grow.
        growth: Factor per step.
    """

    step: int
    block: int
    growth: float


def train(
    config: TokenTransformerConfig,
    *,
    steps: int,
    chains: int,
    seed: int,
    attention_every: int,
    fault: Fault | None,
    log_dir: Path,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, RecordedSeries]:
    """Train one model with probes attached.

    Args:
        config: The model.
        steps: Optimizer steps.
        chains: Markov chains the data comes from.
        seed: Of weights and data; two runs of one seed differ by the fault alone.
        attention_every: Steps between two records of attention.
        fault: None trains the clean run.
        log_dir: Receives TensorBoard events; those of an earlier run there are replaced.
        on_step: Called after each step.

    Returns:
        The probe's records of whole layers, by tag `quantity/layer`.

    Raises:
        OSError: `log_dir` cannot be written.
    """
    for stale in log_dir.glob("events.out.tfevents.*"):
        stale.unlink()
    torch.manual_seed(seed)
    model = TokenTransformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    batches = chain_batches(
        vocabulary=config.vocabulary,
        num_chains=chains,
        batch_size=BATCH_SIZE,
        tokens=config.max_tokens + 1,
        seed=seed,
    )
    with probes.attach(
        model,
        optimizer,
        log_dir=log_dir,
        attention_every=attention_every,
        attention_rows=None,  # all rows: exact values, cheap at this length
        on_divergence="ignore",
    ) as probe:
        for step, tokens in zip(range(steps), batches, strict=False):
            if fault is not None and step >= fault.step:
                _grow_query_and_key(model, fault)
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            probe.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            on_step()
    return to_series(
        (record.series.tag, record.step, record.value) for record in probe.records if record.head is None
    )


@torch.no_grad()
def _grow_query_and_key(model: TokenTransformer, fault: Fault) -> None:
    for projection in ("query", "key"):
        model.get_parameter(f"blocks.{fault.block}.attention.{projection}.weight").mul_(fault.growth)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("attention_collapse", __doc__)
    add = parser.add_argument
    add("--steps", type=positive_int, default=160, help="optimizer steps of each run (default 160)")
    add("--fault-step", type=positive_int, default=110, help="where the fault begins (default 110)")
    add("--block", type=int, default=1, help="block whose query and key weights grow (default 1)")
    add("--growth", type=positive_float, default=1.08, help="their factor per step (default 1.08)")
    add("--chains", type=positive_int, default=2, help="Markov chains behind the data (default 2)")
    add("--seed", type=int, default=0, help="of weights and data, alike in both runs (default 0)")
    add(
        "--embed-dim",
        type=positive_int,
        default=128,
        help="width of the model, a multiple of 4 (default 128)",
    )
    add("--layers", type=positive_int, default=4, help="blocks of the model (default 4)")
    add("--tokens", type=positive_int, default=128, help="tokens of a sequence (default 128)")
    add("--attention-every", type=positive_int, default=2, help="steps between attention records (default 2)")
    add_threads(parser)
    add("--log-dir", type=Path, default=DEFAULT_LOG_DIR, help=f"where to write (default {DEFAULT_LOG_DIR})")
    options = parser.parse_args(arguments)
    if not 0 <= options.block < options.layers:
        parser.error(
            f"--block must name one of the {options.layers} blocks, 0 to {options.layers - 1}; "
            f"got {options.block}."
        )
    if options.embed_dim % TokenTransformerConfig.num_heads:
        parser.error(
            f"--embed-dim must be a multiple of the {TokenTransformerConfig.num_heads} heads; "
            f"got {options.embed_dim}."
        )
    if options.fault_step >= options.steps:
        parser.error(
            f"--fault-step must come before the last of the {options.steps} steps; got {options.fault_step}."
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both runs and report.

    Exit status: 0, 130 after Ctrl-C, 2 if the log directory cannot be written.
    """
    options = parse_arguments(arguments)
    console = report_console()
    torch.set_num_threads(options.threads)
    config = TokenTransformerConfig(
        vocabulary=64, max_tokens=options.tokens, embed_dim=options.embed_dim, num_layers=options.layers
    )
    fault = Fault(options.fault_step, options.block, options.growth)
    started = time.time()
    runs: dict[str, dict[str, RecordedSeries]] = {}
    try:
        with progress_bar(console) as progress:
            for name, this_fault in (("clean", None), ("faulty", fault)):
                task = progress.add_task(name, total=options.steps)
                runs[name] = train(
                    config,
                    steps=options.steps,
                    chains=options.chains,
                    seed=options.seed,
                    attention_every=options.attention_every,
                    fault=this_fault,
                    log_dir=options.log_dir / name,
                    on_step=partial(progress.advance, task),
                )
    except KeyboardInterrupt:
        console.print("Interrupted; both runs are needed for a comparison.")
        return 130
    except OSError as error:
        return fail("attention_collapse", error)

    pair = PairedRuns(**runs, fault_step=fault.step, fault_layer=f"blocks.{fault.block}.attention")
    facts = {
        "schema_version": 1,
        **run_facts("attention_collapse", arguments, started),
        "config": {
            "model": asdict(config),
            "fault": asdict(fault),
            "steps": options.steps,
            "chains": options.chains,
            "seed": options.seed,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "attention_every": options.attention_every,
        },
    }
    json_path, figure_path = options.log_dir / "summary.json", options.log_dir / "attention_collapse.png"
    write_json(json_path, {**facts, **summary(pair)})
    draw_figure(figure_path, pair)
    console.print(summary_table(pair))
    console.print(conclusion(pair), highlight=False)
    console.print(f"Written: {json_path}, {figure_path}. TensorBoard: tensorboard --logdir {options.log_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
