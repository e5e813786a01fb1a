"""How often the intervals hold the truth, and how often the paired test errs, by simulation.

Evaluations are invented: keys with one query or several, whose answers stand and fall together to a degree rho, and a
true R@k. An interval of 95 % should hold the truth in 95 % of them
(wanted: .93 to .97), the test should find a difference between equals in 5 % of them (wanted: .03 to .06). With few
queries near 100 % only a few outcomes are possible: of 50 queries at R = .99
all are right in 61 %, 49 in 31 %, 48 in 8 % of the evaluations, so that any rule holds the truth in 91 or in 99 %.
Beside the coverage at R exactly stands the mean over true values around it
(1 - R from 0.7 to 1.3 times as large), and beside both the percentile bootstrap. All cells are printed, bad ones too.

The test of recipes (`seed_paired_test`) is tried on invented studies: queries are hard or easy, a recipe may suit some
of them (and be no better in the mean), and a seed moves R by 0, half or twice as much as another choice of queries
would. An arm has 1, 2, 3 or 5 seeds. With one seed the error shows what the seeds that are not covered do.

    python bench/statistics.py
"""
if (
    __name__ == "statistics"
):  # whoever stands in this folder and imports the standard library's module of this name shall get it
    import importlib.util
    import sys
    import sysconfig

    spec = importlib.util.spec_from_file_location("statistics", sysconfig.get_paths()["stdlib"] + "/statistics.py")
    sys.modules["statistics"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["statistics"])

from dataclasses import dataclass

import numpy as np

RECALLS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
WANTED, WANTED_ERRORS = (0.93, 0.97), (0.03, 0.06)


@dataclass(frozen=True)
class Design:
    "How many keys there are, how many queries a key has, and how far they stand and fall together."
    keys: int
    most: int = 1  # queries of a key: 1 to so many, evenly
    rho: float = 0.0  # correlation of two queries of a key

    def draw_keys(self, rng: np.random.Generator) -> np.ndarray:
        "(Q,) the key of each query."
        return np.repeat(np.arange(self.keys), rng.integers(1, self.most + 1, self.keys))

    def draw_luck(self, keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        "(Q,) from 0 to 1: a query is right where its luck is below R."
        own, shared = rng.random(len(keys)), rng.random(self.keys)[keys]
        return np.where(rng.random(len(keys)) < np.sqrt(self.rho), shared, own)

    def __str__(self) -> str:
        return f"{self.keys:4} keys of 1" + (f" to {self.most}, rho {self.rho:g}" if self.most > 1 else "")


DESIGNS = (
    Design(50), Design(200), Design(800), Design(50, 3, 0.5), Design(200, 3, 0.5), Design(23), Design(23, 3, 0.3),
    Design(23, 15, 0.1), Design(23, 15, 0.5),
)


def around(recall: float, rng: np.random.Generator) -> float:
    "A true value near `recall`."
    return 1 - (1 - recall) * rng.uniform(0.7, 1.3)


def coverage(design: Design, recall: float, repeats: int, seed: int = 0) -> dict[str, float]:
    """Shares of evaluations whose interval holds the truth: at `recall`, around it, and for the percentile bootstrap
    around it.
    """
    from moon2_lab.evaluation.statistics import bootstrap_ci, share_interval

    rng, held = np.random.default_rng(seed), np.zeros(3)
    for turn in range(repeats):
        keys, near = design.draw_keys(rng), around(recall, rng)
        luck = design.draw_luck(keys, rng)
        found = (luck < near).astype(float)
        for place, (truth, ends) in enumerate(
            (
                (recall, share_interval(luck < recall, keys)), (near, share_interval(found, keys)),
                (near, bootstrap_ci(found, keys, 400, turn)),
            )
        ):
            held[place] += ends[0] - 1e-9 <= truth <= ends[1] + 1e-9
    return dict(zip(("at", "around", "percentile"), (held / repeats).tolist()))


def errors(design: Design, recall: float, repeats: int, seed: int = 0, same: float = 0.6) -> dict[str, float]:
    """Two models: coverage of the difference where there is none and where one errs half as often again, and the share
    of p <= .05 where there is none.
    """
    from moon2_lab.evaluation.statistics import paired_test

    rng, counted = np.random.default_rng(seed), np.zeros(3)
    for turn in range(repeats):
        keys, near = design.draw_keys(rng), around(recall, rng)
        luck, other = design.draw_luck(keys, rng), design.draw_luck(keys, rng)
        other = np.where(rng.random(len(keys)) < same, luck, other)
        for place, worse in enumerate((near, 1 - 1.5 * (1 - near))):
            test = paired_test(luck < near, other < worse, keys, 400, turn)
            counted[place] += test["lo"] - 1e-9 <= near - worse <= test["hi"] + 1e-9
            counted[2] += place == 0 and test["p"] <= 0.05
    return dict(zip(("no difference", "difference", "errors"), (counted / repeats).tolist()))


@dataclass(frozen=True)
class Study:
    "Two recipes of equal worth: seeds of each, how much a seed moves R beside what queries do, and what suits whom."
    seeds: tuple[int, int]
    moody: float  # standard deviation of R between seeds / that between samples of queries
    suits: float = 0.0  # standard deviation of the queries' preference for one recipe; their difficulty has 1
    chance: float = 0.5  # of the same query in another run
    queries: int = 300
    most: int = 1  # queries of a key

    def draw(self, recall: float, gap: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        "Hits (S_a, Q) and (S_b, Q), A's R larger by the mean of `gap`, and the keys."
        from statistics import NormalDist

        keys = np.repeat(np.arange(self.queries), rng.integers(1, self.most + 1, self.queries))[: self.queries]
        normal, spread = NormalDist(), np.sqrt(1 + self.suits**2 + self.chance**2)
        slope = normal.pdf(normal.inv_cdf(recall))  # R gained by a shift of one standard deviation
        moved = self.moody * np.sqrt(recall * (1 - recall) / self.queries) / slope
        # a seed spreads R as well: the same R in the mean needs a higher threshold
        level, hard = normal.inv_cdf(recall) * np.hypot(1, moved), rng.normal(size=self.queries)[keys]
        arms = []
        for seeds, shift in zip(self.seeds, (gap / slope, 0.0)):
            likes = hard + self.suits * rng.normal(size=self.queries)[keys]
            luck = likes + self.chance * rng.normal(size=(seeds, self.queries))
            arms.append(luck / spread + moved * rng.normal(size=(seeds, 1)) < level + shift)
        return *arms, keys

    def __str__(self) -> str:
        a, b = self.seeds
        return f"{a} and {b} seeds, seed / queries {self.moody:g}, suits {self.suits:g}, {self.most} a key"


MOODS, SEEDS = (0.0, 0.5, 2.0), ((1, 1), (2, 2), (3, 3), (5, 5), (3, 1))
STUDIES = [
    *(Study(seeds, moody, suits) for seeds in SEEDS for moody in MOODS for suits in (0.0, 0.7)),
    *(Study((3, 3), moody, 0.7, most=3) for moody in MOODS), *(Study((3, 3), moody, 0.0, 1.5) for moody in MOODS),
    *(Study((3, 3), moody, 0.7, queries=50) for moody in MOODS),
]


def study_errors(study: Study, recall: float, repeats: int, seed: int = 0) -> dict[str, float]:
    "Coverage of the interval and share of p <= .05 of `seed_paired_test`, and of seeds taken for queries, for equals."
    from moon2_lab.evaluation.seed_statistics import seed_paired_test
    from moon2_lab.evaluation.statistics import paired_test

    rng, held, wrong, naive = np.random.default_rng(seed), 0, 0, 0
    for turn in range(repeats):
        a, b, keys = study.draw(recall, 0.0, rng)
        test = seed_paired_test(a, b, keys, 400, turn)
        held += test["lo"] - 1e-9 <= 0 <= test["hi"] + 1e-9
        wrong += test["p"] <= 0.05
        naive += paired_test(a.mean(axis=0), b.mean(axis=0), keys, 400, turn)["p"] <= 0.05
    return {"coverage": held / repeats, "errors": wrong / repeats, "errors over queries alone": naive / repeats}


def macro_coverage(rarest: int, repeats: int, classes: int = 6, right: float = 0.7, seed: int = 0) -> dict[str, float]:
    """Coverage of the percentile bootstrap of macro F1, where the rarest of the classes has `rarest` products in the
    mean and the others 10 times as many.
    """
    from moon2_lab.evaluation.ranking import _class_marks, _fewest_keys, _macro_rates, classification_scores
    from moon2_lab.evaluation.statistics import key_draws, percentile_ci

    rng, weight = np.random.default_rng(seed), np.r_[1.0, np.full(classes - 1, 10.0)]
    share, products = weight / weight.sum(), round(rarest * weight.sum())
    hit = share * (right + (1 - right) / classes)  # the answer is right, or any class at random
    chosen = hit + (1 - share) * (1 - right) / classes
    truth_f1, held, shown = float(np.mean(2 * hit / (chosen + share))), 0, 0
    for turn in range(repeats):
        truth = rng.choice(classes, products, p=share)
        answer = np.where(rng.random(products) < right, truth, rng.integers(0, classes, products))
        marks = _class_marks(truth[:, None] == np.arange(classes), answer)
        samples = [
            _macro_rates(*(part.per_class(times, classes) for part in marks))
            for times in key_draws(products, 400, turn)
        ]
        low, high = percentile_ci(np.concatenate(samples))[2]
        held += low <= truth_f1 <= high
        shown += bool(classification_scores(truth, answer, n_classes=classes, resamples=1)["macro_f1"]["ci95"])
        assert _fewest_keys(marks[2], np.arange(products)) >= 0
    return {"coverage": held / repeats, "interval_shown": shown / repeats}


def sign(value: float, wanted: tuple[float, float], noise: float) -> str:
    "The share as it is printed; a star where it lies outside by more than two standard errors."
    return f"{value:.3f}{' ' if wanted[0] - 2 * noise <= value <= wanted[1] + 2 * noise else '*'}"


def print_studies(repeats: int) -> list[dict]:
    "Print and return coverage and errors of the test of recipes, cell by cell."
    noise, rows = (0.95 * 0.05 / repeats) ** 0.5, []
    print(f"{'two recipes of equal worth':55} {'Q':>4} {'R':>5}  coverage  errors at .05 | over queries alone")
    for study in STUDIES:
        for recall in (0.7, 0.97):
            found = study_errors(study, recall, repeats)
            cells = sign(found["coverage"], WANTED, noise), sign(found["errors"], WANTED_ERRORS, noise)
            cells = f"{'     '.join(cells)}        | {found['errors over queries alone']:.3f}"
            print(f"{str(study):55} {study.queries:4} {recall:5.2f}  {cells}", flush=True)
            rows.append({"study": str(study), "queries": study.queries, "recall": recall, **found})
    return rows


def main() -> None:
    from common import finish, options, start

    parser = options(__doc__, repeats=1000)
    args = parser.parse_args()
    repeats = 60 if args.quick else args.repeats
    about, rows = start(args), []
    noise = (0.95 * 0.05 / repeats) ** 0.5
    print(
        f"{repeats} evaluations a cell; * = outside {WANTED[0]} to {WANTED[1]} (errors of the test: "
        f"{WANTED_ERRORS[0]} to {WANTED_ERRORS[1]}) by more than two standard errors"
    )
    print(f"{'':29} {'R':>5}   at R  around  percentile | difference: none, some | errors at .05")
    for design in DESIGNS:
        for recall in RECALLS:
            share, pair = coverage(design, recall, repeats), errors(design, recall, repeats)
            cells = [sign(share[name], WANTED, noise) for name in ("at", "around", "percentile")] + [
                sign(pair[name], WANTED, noise) for name in ("no difference", "difference")
            ]
            print(
                f"{str(design):29} {recall:5.2f}  {cells[0]}  {cells[1]}  {cells[2]}     | {cells[3]}  {cells[4]}     "
                f"    | {sign(pair['errors'], WANTED_ERRORS, noise)}",
                flush=True,
            )
            rows.append({"design": str(design), "recall": recall, **share, **pair})
    studies = print_studies(repeats)
    macro = {rarest: macro_coverage(rarest, max(20, repeats // 4)) for rarest in (3, 5, 10, 20, 40)}
    for rarest, found in macro.items():
        print(
            f"macro F1, rarest class with {rarest:2} products in the mean: coverage {found['coverage']:.3f}, interval "
            f"shown in {found['interval_shown']:.0%}"
        )
    results = {"cells": rows, "studies": studies, "macro_f1": macro}
    finish(args, {"benchmark": "statistics", **about, "evaluations": repeats, **results})


if __name__ == "__main__":
    main()
