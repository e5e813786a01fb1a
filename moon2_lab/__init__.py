"""moon2_lab: an interactive workbench for MOON2.0 product embeddings.

The public Python interface is `from moon2_lab import NAME`; a name is loaded when it is first asked for, so that
`import moon2_lab` loads nothing heavy. Everything else lives in the rooms: data, data.importers, data.synthetic, model,
evaluation, augment, objective, training, explain, retrieval, studies, reporting,
widgets, app, cli.
"""
__version__ = "0.1.0"

_HOMES = {  # module -> its public names
    "config": "EncoderConfig TrainConfig",
    "errors": "LabError DataError UsageError",
    "data.catalog": "Catalog",
    "data.images": "ImageRef",
    "data.products": "Item Product",
    "data.queries": "Lexicon",
    "data.triplets": "Triplet build_triplets",
    "data.importers.importer": "import_catalog",
    "data.synthetic.generator": "make_catalog",
    "model.encoder": "Moon2Encoder",
    "evaluation.benchmark_run": "run_public_benchmark",
    "evaluation.evaluate": "evaluate",
    "augment.pipeline": "augment_catalog",
    "objective.objective": "Moon2Objective",
    "training.trainer": "Trainer",
    "explain.explainer": "Explainer",
    "retrieval.embed": "embed_catalog",
    "retrieval.search": "Searcher open_searcher",
    "retrieval.vectors": "VectorFile",
    "retrieval.what_if": "what_if_pair",
    "studies.study_tests": "study_tests",
    "studies.modality_stress": "stress_study",
    "reporting.comparison": "compare_encoders",
    "reporting.embedding_map": "embedding_map",
    "reporting.hub": "push_to_hub",
    "widgets.embedding_map": "embedding_map_widget",
    "widgets.heatmap": "heatmap compare_heatmaps",
    "widgets.what_if": "what_if_widget",
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = [*sorted(_MODULES)]  # noqa: PLE0604


def __getattr__(name: str):
    "The public name, from the module that defines it (PEP 562)."
    if name not in _MODULES:
        raise AttributeError(f"module 'moon2_lab' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"moon2_lab.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    "What can be imported from here."
    return sorted(set(globals()) | set(__all__))
