"""Mistakes that preference trainers have really made, put into ours one at a time: the tests must see every one.

python tools/mutants.py                all of them, as a table; fails where one is not caught
python tools/mutants.py NAME ...       only these
python tools/mutants.py --write        also writes tools/results/mutants.md

Each mutant is a change of a few characters in one module, made while the module is imported in a process of its own
(the files stay as they are), and the tests that must fail then.
"""

# ruff: noqa: E501  the table is easier to read with a mistake's text on one line

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
TABLE, SAME = "tests/objectives/test_table.py", "tests/objectives/test_identities.py"
NAMES, GRID = "tests/objectives/test_names.py", "tests/objectives/test_trainer.py"
STATISTICS = "tests/model/test_statistics.py"


@dataclass(frozen=True)
class Mutant:
    """module: dotted name; old: text in it, found exactly once; new: what stands there instead. tests: file and -k
    expression of those that must catch it. story: who made the mistake."""

    name: str
    story: str
    module: str
    old: str
    new: str
    tests: tuple[str, str]


O = "megadpo.objectives."
MUTANTS = [
    Mutant("ipo-sums", "IPO on summed log-probabilities (TRL #1265, LLaMA-Factory)", O + "margins",
           'if self.log_ratio == "average" else', 'if self.log_ratio == "none" else', (TABLE, "usual and IPO")),
    Mutant("loss-type-ignored", "loss_type is read and never used (ms-swift #10167)", "megadpo.config.decode",
           "kind = OBJECTIVES[name]", "kind = OBJECTIVES[DEFAULT_OBJECTIVE]", (NAMES, "alias_sets or a_mix")),
    Mutant("settings-ignored", "a setting that the loss does not have is dropped silently", "megadpo.config.decode",
           "if key not in names:", "if False:", (NAMES, "no_objective_takes")),
    Mutant("smoothing-ignored", "label_smoothing has no effect (TRL since #3906)", O + "pairwise",
           "return -(1 - label_smoothing) * logsigmoid(margin_G) - label_smoothing * logsigmoid(-margin_G)",
           "return -logsigmoid(margin_G)", (TABLE, "usual and DPO and 0.7")),
    Mutant("alpha-on-the-dpo-term", "RPO's alpha on the preference term (TRL before #1904)", O + "pairwise",
           "outcome.loss + self.nll_weight * nll", "self.nll_weight * outcome.loss + nll", (TABLE, "usual and DPOWithNLL")),
    Mutant("nll-over-tokens", "token mean where the paper has the mean per response (TRL #1705)", O + "pairwise",
           'return "first_tokens" if self.normalise == "tokens" else "groups"', 'return "first_tokens"',
           (TABLE, "usual and DPOWithNLL")),
    Mutant("nll-of-a-micro-batch", "likelihood averaged over one micro-batch (TRL)", O + "base",
           "whole = self.counts if self.whole is None else self.whole", "whole = self.counts", (TABLE, "halves and CPO")),
    Mutant("nll-twice-averaged", "the likelihood term is normalised twice (LLaMA-Factory #6722)", O + "reference_free",
           'return -(pairs.average_G2 if self.normalise == "response" else pairs.policy_G2)[:, 0]',
           "return -pairs.average_G2[:, 0] / pairs.tokens_G2[:, 0]", (TABLE, "usual and ORPO")),
    Mutant("log1p-of-exp", "log(1 - e^x) by log1p near probability 1 (ORPO's code, TRL before #4763)", O + "reference_free",
           "upper = torch.log(-torch.expm1(torch.where(near_one, logp, -1.0)))",
           "upper = torch.log1p(-torch.exp(torch.where(near_one, logp, -1.0)))", (TABLE, "ties and ORPO")),
    Mutant("certain-token", "a response of probability 1 gives NaN", O + "reference_free",
           "logp = logp - (logp.detach() + CERTAIN).clamp(min=0)", "logp = logp + 0.0", (TABLE, "certain")),
    Mutant("sppo-scaled", "SPPO with beta x ratio against 1/2 (TRL #1612)", O + "margins",
           "target = 1 / (2 * self.beta)\n        return (pairs.ratio_G2[:, 0] - target) ** 2",
           "target = 0.5\n        return (self.beta * pairs.ratio_G2[:, 0] - target) ** 2", (TABLE, "usual and SPPOHard")),
    Mutant("ld-absolute", "LD-DPO cut by the place in the stream (ms-swift #6945)", O + "base",
           "torch.arange(size, device=self.tokens_S.device) - self.per_token(self.starts_S())",
           "torch.arange(size, device=self.tokens_S.device)", (TABLE, "usual and LDDPO")),
    Mutant("kto-unclamped", "KTO's z below 0", O + "unpaired",
           'sequences.field("mismatched_kl").detach().clamp(min=0)', 'sequences.field("mismatched_kl").detach()',
           (TABLE, "extreme and KTO")),
    Mutant("kto-bounded", "KTO's z cut at the top, too", O + "unpaired",
           "detach().clamp(min=0)", "detach().clamp(min=0, max=5)", (TABLE, "upper_bound")),
    Mutant("beta-unbounded", "beta-DPO's beta down to 0", O + "across_pairs",
           ".clamp(min=1e-3)", ".clamp(min=1e-9)", (TABLE, "lower_bound")),
    Mutant("kto-weights", "KTO's two weights exchanged", O + "unpaired",
           "torch.where(good_S, self.desirable_weight * good, self.undesirable_weight * bad)",
           "torch.where(good_S, self.undesirable_weight * good, self.desirable_weight * bad)", (TABLE, "usual and KTO")),
    Mutant("kto-kl-per-rank", "KTO's KL of one rank (TRL: mean of the ranks' means)", "megadpo.train.passes",
           "context.sum_over_data(sums)\n    return sums[0]", "pass\n    return sums[0]", (GRID, "slice")),
    Mutant("kto-kl-matched", "KTO's KL from the responses to their own prompts (TRL #1402)", "megadpo.train.step",
           "mean_ratio(state.chunks, reference, mismatched, context)", "mean_ratio(state.chunks, reference, batches, context)",
           (GRID, "strangers")),
    Mutant("aot-micro-batch", "AOT sorts within a micro-batch (TRL)", O + "across_pairs",
           '    label_smoothing: float = 0.0\n    """Probability that a label is the wrong way round."""\n\n'
           "    whole_batch: ClassVar[bool] = True\n\n    def problems(self) -> list[str]:\n"
           "        return self.must(beta=(self.beta > 0, POSITIVE), label_smoothing=(0 <= self.label_smoothing < 0.5, "
           "SMOOTHING))\n\n    def losses(self, pairs: Pairs) -> Tensor:\n        policy_G",
           '    label_smoothing: float = 0.0\n\n    def problems(self) -> list[str]:\n        return []\n\n'
           "    def losses(self, pairs: Pairs) -> Tensor:\n        policy_G", (TABLE, "halves and AOT")),
    Mutant("aot-pairs", "the paired formula under the unpaired name (TRL's old aot_pair)", O + "across_pairs",
           "sorted_G2 = pairs.ratio_G2.sort(dim=0).values", "sorted_G2 = pairs.ratio_G2", (TABLE, "usual and AOTUnpaired")),
    Mutant("wpo-unclamped", "WPO's weight over 1 (TRL)", O + "token_level",
           "        if self.clamp:\n", "        if False:\n", (TABLE, "WPO")),
    Mutant("bco-unshifted", "BCO without its shift (TRL since #3906)", O + "across_pairs",
           "(reward_G2 - reward_G2.detach().mean()).unbind(1)", "reward_G2.unbind(1)", (TABLE, "usual and BCO")),
    Mutant("no-reference", "DPO that never looks at the reference (Liger #378)", O + "pairwise",
           "return self.policy_G2 - self.reference_G2", "return self.policy_G2 - 0", (SAME, "changes_with_the_reference")),
    Mutant("strict-accuracy", "ties count as misses (all peers: 0 at the first step)", O + "pairwise",
           "torch.full_like(margin_G, 0.5)", "torch.full_like(margin_G, 0.0)", (SAME, "tie_counts_half")),
    Mutant("rewards-without-beta", "logged rewards lack beta (NeMo-RL)", O + "pairwise",
           "return self.scale * pairs.ratio_G2", "return pairs.ratio_G2", (SAME, "tie_counts_half")),
    Mutant("bfloat16", "margins in bfloat16", O + "base",
           "return value.double() if value.is_floating_point() else value",
           "return value.bfloat16().double() if value.is_floating_point() else value", (TABLE, "usual and SPIN")),
    Mutant("averaged-dpo", "log-probabilities averaged where the paper sums", O + "pairwise",
           "return difference(self.ratio_G2)", "return difference(self.ratio_G2 / self.tokens_G2)", (TABLE, "usual and SPIN")),
    Mutant("swapped", "rejected minus chosen", O + "pairwise",
           "return values_G2[:, 0] - values_G2[:, 1]", "return values_G2[:, 1] - values_G2[:, 0]", (TABLE, "usual and SPIN")),
    Mutant("robust-unscaled", "robust DPO without 1 / (1 - 2 e)", O + "pairwise",
           "flipped * logsigmoid(-margin_G)) / (1 - 2 * flipped)", "flipped * logsigmoid(-margin_G))",
           (TABLE, "usual and Robust")),
    Mutant("exo-not-normalised", "EXO's log e of -10 beside log 1 (its authors' code)", O + "anchored",
           "math.log(self.label_smoothing)", "(-10.0)", (TABLE, "usual and EXO")),
    Mutant("discopop-overflow", "e^-m times 0 (TRL)", O + "anchored",
           "exponential_G = torch.exp(logsigmoid(margin_G / self.tau) - margin_G)",
           "exponential_G = (margin_G / self.tau).sigmoid() * torch.exp(-margin_G)", (TABLE, "extreme and DiscoPOP")),
    Mutant("f-dpo-coefficient", "the alpha divergence's coefficient counted from the other end (TRL)", O + "divergences",
           "-exponential_minus_1(-self.alpha * ratio_G2) / self.alpha",
           "-exponential_minus_1((self.alpha - 1) * ratio_G2) / (1 - self.alpha)", (TABLE, "usual and FDPO and alpha")),
    Mutant("tdpo-through-chosen", "TDPO2's chosen KL with a gradient", O + "token_level",
           "rejected_G - chosen_G.detach()", "rejected_G - chosen_G", (TABLE, "usual and TDPO2")),
    Mutant("kl-without-gradient", "TDPO's KL is a constant of the step", "megadpo.train.passes",
           "kl_N=output.kl_N,", "kl_N=None if output.kl_N is None else output.kl_N.detach(),", (STATISTICS, "transformers and False")),
    Mutant("rivals-by-place", "the drawn token depends on the micro-batch that the pair is in", "megadpo.model.head",
           "torch.arange(size, device=device) - start_N", "torch.arange(size, device=device)", (GRID, "slice")),
    Mutant("simpo-ratio", "SimPO's gamma taken for gamma / beta", O + "reference_free",
           "smoothed(difference(self.rewards(pairs)) - self.gamma, self.label_smoothing)",
           "smoothed(difference(self.rewards(pairs)) - self.beta * self.gamma, self.label_smoothing)",
           (TABLE, "usual and SimPO")),
    Mutant("slic-is-hinge", "SLiC without its likelihood term (hinge under its name)", O + "reference_free",
           "    @property\n    def nll_weight(self) -> float:\n        return self.alpha\n\n"
           "    def problems(self) -> list[str]:\n        return self.must(delta",
           "    @property\n    def nll_weight(self) -> float:\n        return 0.0\n\n"
           "    def problems(self) -> list[str]:\n        return self.must(delta", (TABLE, "usual and SLiC")),
    Mutant("llama3-unmasked", "formatting tokens stay in the margin", O + "token_level",
           'torch.where(sequences.field("body_N"), ratio_N, torch.zeros_like(ratio_N))', "ratio_N",
           (TABLE, "usual and Llama3")),
    Mutant("list-backwards", "a ranked list read from the worst on", O + "listwise",
           "remaining_GK = reward_GK.flip(1).logcumsumexp(1).flip(1)", "remaining_GK = reward_GK.logcumsumexp(1)",
           (TABLE, "usual and PlackettLuce")),
    Mutant("centring-difference", "reward centring on the difference instead of the sum", O + "reward_model",
           "self.centering * reward_G2.sum(dim=1) ** 2", "self.centering * margin_G ** 2", (TABLE, "usual and BradleyTerry")),
    Mutant("mean-of-means", "a mean over micro-batches of their means (most trainers)", O + "base",
           "return getattr(self.counts, unit).to(torch.int)", "return self.counts.groups.clamp(max=1).to(torch.int)",
           (TABLE, "halves and SPIN")),
    Mutant("whole-batch-own-slope", "every rank takes the first rank's slopes", "megadpo.train.step",
           "before = sum(len(rank) for rank in ranks[: context.data_rank])", "before = 0", (GRID, "slice")),
]  # fmt: skip
QUICK = ["ipo-sums", "loss-type-ignored", "nll-of-a-micro-batch", "log1p-of-exp", "no-reference", "tdpo-through-chosen"]
"""What the ordinary test run tries."""


class Patched(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module with the mutant's text."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.mutant.module:
            return None
        return importlib.util.spec_from_file_location(name, source_of(name), loader=self)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(mutated(self.mutant), str(source_of(module.__name__)), "exec"), module.__dict__)  # noqa: S102  our own source, with a mistake put in


def source_of(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def mutated(mutant: Mutant) -> str:
    """The module's text with the mistake in it."""
    text = source_of(mutant.module).read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"mutant {mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.module}")
    return text.replace(mutant.old, mutant.new)


def caught(mutant: Mutant, log: Path) -> bool:
    """Whether the named tests fail with it. In a fork: torch is imported once for all."""
    mutated(mutant)
    child = os.fork()
    if child == 0:
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        code = 99
        try:
            code = _run(mutant)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        raise SystemExit(f"mutant {mutant.name}: its tests did not run (exit code {code}):\n{log.read_text()[-3000:]}")
    return code == 1


def _run(mutant: Mutant) -> int:
    import pytest

    ours = ("megadpo", "batches", "oracles", "train.engine", "tiny", "distributed", "tests", "test_")
    for name in [n for n in sys.modules if n.split(".")[0] in ours or n.startswith("test_")]:
        del sys.modules[name]
    sys.meta_path.insert(0, Patched(mutant))
    file, words = mutant.tests
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "--tb=line"]
    return int(pytest.main([str(ROOT / file), "-k", words, *options]))


def table(mutants: list[Mutant], tell: Callable[[str], None] = lambda text: None) -> tuple[list[str], list[str]]:
    """(rows of the report, names of those that no test saw)."""
    import mpmath  # noqa: F401  imported here so that forks find it done
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    rows = ["| mutant | the mistake | caught by |", "|---|---|---|"]
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        for mutant in mutants:
            seen = caught(mutant, Path(folder, mutant.name))
            file, words = mutant.tests
            rows.append(f"| {mutant.name} | {mutant.story} | {f'`{file} -k {words!r}`' if seen else '**nothing**'} |")
            alive += [] if seen else [mutant.name]
            tell(f"{mutant.name}: {'caught' if seen else 'NOT CAUGHT'}")
    return rows, alive


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="only these mutants")
    parser.add_argument("--write", action="store_true", help="write tools/results/mutants.md")
    options = parser.parse_args()
    unknown = set(options.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}; there are {', '.join(m.name for m in MUTANTS)}")
    chosen = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    started = time.monotonic()
    rows, alive = table(chosen, lambda text: print(text, flush=True))
    rows.append("")
    rows.append(f"{len(chosen) - len(alive)} of {len(chosen)} caught, in {time.monotonic() - started:.0f} s.")
    print("\n".join(rows))
    if options.write:
        text = "# Mistakes put back in\n\nWritten by `python tools/mutants.py --write`.\n\n" + "\n".join(rows) + "\n"
        (ROOT / "tools" / "results" / "mutants.md").write_text(text)
    return 1 if alive else 0


if __name__ == "__main__":
    raise SystemExit(main())
