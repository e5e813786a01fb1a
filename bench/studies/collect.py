"""The tables of a study, small enough for the repository: python bench/studies/collect.py STUDY bench/results/fashion

STUDY is the folder of `moon2 ablate`; its runs stay where they are. What is written holds numbers and names of variants
only, no product: scores.parquet (every score of every run), means.parquet (over seeds, with intervals), tests.parquet
(Holm over each budget's table), balance.parquet and worst.parquet (modality balance), trade_off.parquet, omega.parquet
(at most 60 steps of each run), and study.json: commands, commit, machine, versions, settings, minutes.
"""
import argparse
import shlex
from pathlib import Path

import pandas as pd

KEPT = (  # of study.json
    "catalog", "data_hash", "split", "products", "trained_on", "steps", "minutes", "started", "updated", "commands",
    "copies", "git", "machine", "versions", "config", "differs_from_paper",
)


def without_places(command: str) -> str:
    "A command with the names of its files and folders, but not where they are."
    return shlex.join([Path(word).name if word.startswith(("/", "~")) else word for word in shlex.split(command)])


def omega_paths(runs: dict[str, list[Path]], most: int = 60) -> pd.DataFrame:
    "Step and omega of each run that has them, thinned."
    tables = []
    for variant, folders in runs.items():
        for seed, folder in enumerate(folders):
            history = pd.read_parquet(folder / "history.parquet").reset_index(drop=True)
            columns = [name for name in history if name.startswith("omega_")]
            if columns:
                some = history.iloc[:: max(1, -(-len(history) // most))]
                tables.append(some[["step", *columns]].assign(variant=variant, seed=seed))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def tables_of(out: Path) -> dict[str, pd.DataFrame]:
    "All tables by name."
    from moon2_lab.studies import ablation, modality_balance, study_tests

    means = [ablation.seed_means(out, metric).assign(metric=metric) for metric in ("R@1", "R@10")]
    tables = {"scores": ablation.ablation_table(out), "means": pd.concat(means, ignore_index=True)}
    tables["tests"], runs_of = study_tests.write_study_tests(out), ablation.runs_by_budget(out)
    makers = {
        "balance": modality_balance.balance_table, "worst": modality_balance.worst_direction_tests,
        "trade_off": modality_balance.trade_off_table, "omega": omega_paths,
    }
    for name, make in makers.items():
        parts = [make(runs).assign(budget=budget) for budget, runs in runs_of.items()]
        tables[name] = pd.concat(parts, ignore_index=True)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    from moon2_lab.files import read_json, write_json, write_parquet

    args.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables_of(args.study).items():
        write_parquet(args.out / f"{name}.parquet", table)
    note = read_json(args.study / "study.json")
    kept = {name: note[name] for name in KEPT if name in note}
    kept["commands"] = [without_places(command) for command in kept.get("commands", [])]
    write_json(args.out / "study.json", kept)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{size / 1e6:.2f} MB in {args.out}")


if __name__ == "__main__":
    main()
