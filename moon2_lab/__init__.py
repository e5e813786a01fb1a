"""moon2_lab: an interactive workbench for MOON2.0 product embeddings."""
__version__ = "0.1.0"
