"""hvdformer: train Transformers on Horovod and MPI, from one command."""

__version__ = "0.1.0"
