"""Parity with transformers, and the proof that a fault would show. Needs the `oracle` extra.

    python -m experiments.parity        # prints the tables, writes experiments/results/parity.json

Small models of every family are made in transformers, saved by `save_pretrained` and read by `jaxfw.weights.load`. Tiny
models with default initialisation prove little: leaving RoPE scaling out altogether moves their logits by
6e-5. So these have sharp attention (query and key projections x6), random norm scales and biases, small
embeddings (so that the eps of norms counts), logits with a deviation of at least 1, and prompts of 4x the
context before stretching, or of more than 4 windows.

An error of logits is the largest absolute difference over valid tokens, divided by the standard deviation
of transformers' logits. An error of gradients is, of the worst parameter, the largest absolute difference
divided by the largest absolute gradient of that parameter. Rows are right-padded; of kind `dynamic`, whose
frequencies depend on a row's length, transformers runs each row alone. Each fault of `FAULTS` is planted
alone in our side. One case of each family also runs on four devices, loaded straight to a mesh.
"""

from experiments.parity.case import Case, Oracle, build, make_model, reference_logits, restart
from experiments.parity.fault import Fault
from experiments.parity.measure import TOLERANCE, VISIBLE, fault_error, gradient_errors, logits_error
from experiments.parity.report import CASES, FAULTS, RESULTS, first_of_families, main, run
from experiments.parity.sharded import sharded_errors

__all__ = [
    "CASES",
    "FAULTS",
    "RESULTS",
    "TOLERANCE",
    "VISIBLE",
    "Case",
    "Fault",
    "Oracle",
    "build",
    "fault_error",
    "first_of_families",
    "gradient_errors",
    "logits_error",
    "main",
    "make_model",
    "reference_logits",
    "restart",
    "run",
    "sharded_errors",
]
