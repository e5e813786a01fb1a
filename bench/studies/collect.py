"""The tables of a study, small enough for the repository: python bench/studies/collect.py STUDY bench/results/fashion

STUDY is the folder of `moon2 ablate`; its runs stay where they are. What is written holds numbers and names of variants
only, no product: scores.parquet (every score of every run), means.parquet (over seeds, with intervals), tests.parquet
(Holm over each budget's table), balance.parquet and worst.parquet (modality balance), trade_off.parquet, omega.parquet
(at most 60 steps of each run), and study.json: commands, commit, machine, versions, settings, minutes. A budget that is
in the tables already and not in STUDY stays as it is; study.json says under "earlier" where it came from.
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


def joined(table: pd.DataFrame, path: Path, budgets: list[str]) -> pd.DataFrame:
    "The table with the rows of other budgets that stand in the file."
    before = pd.read_parquet(path) if path.is_file() else table.iloc[:0]
    return pd.concat([before[~before.budget.isin(budgets)], table], ignore_index=True)


def joined_note(note: dict, before: dict, kept: list[str]) -> dict:
    "study.json of both: all commands, the steps that are known, and where the kept budgets came from."
    note["commands"] = list(dict.fromkeys([*before.get("commands", []), *note.get("commands", [])]))
    note["steps"] = note.get("steps") or before.get("steps", 0)
    note["copies"] = before.get("copies", {}) | note.get("copies", {})
    known = {name: before[name] for name in ("git", "machine", "versions", "started", "updated") if name in before}
    earlier = before.get("earlier", {})
    return note | ({"earlier": {budget: earlier.get(budget, known) for budget in kept}} if kept else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    from moon2_lab.files import read_json, write_json, write_parquet

    args.out.mkdir(parents=True, exist_ok=True)
    tables, before = tables_of(args.study), args.out / "study.json"
    budgets = sorted(set(tables["scores"].budget))
    tables = {name: joined(table, args.out / f"{name}.parquet", budgets) for name, table in tables.items()}
    for name, table in tables.items():
        write_parquet(args.out / f"{name}.parquet", table)
    note = read_json(args.study / "study.json")
    note = {name: note[name] for name in KEPT if name in note}
    note["commands"] = [without_places(command) for command in note.get("commands", [])]
    others = sorted(set(tables["scores"].budget) - set(budgets))
    write_json(before, joined_note(note, read_json(before) if before.is_file() else {}, others))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{size / 1e6:.2f} MB in {args.out}")


if __name__ == "__main__":
    main()
