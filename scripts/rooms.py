"""The rooms of the package in reading order: a room imports only from those before it. "(root)" is the package itself.
"""
PURPOSES = {
    "(root)": "settings, errors, files, the machine",
    "data": "a folder becomes products, queries, triplets, batches",
    "data.importers": "foreign tables become a catalogue",
    "data.synthetic": "drawn products",
    "model": "a product becomes a vector",
    "evaluation": "how good, how sure",
    "augment": "better titles, more pictures",
    "objective": "what is minimised",
    "training": "the step-through loop",
    "rivals": "other models behind the same interface",
    "explain": "why this match",
    "retrieval": "vectors, store, search",
    "studies": "many runs, one question",
    "reporting": "tables, figures, pages",
    "widgets": "to touch in JupyterLab",
    "app": "the browser demo",
    "cli": "the command",
}
ROOMS = tuple(PURPOSES)
