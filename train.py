"""Pretrains a method of the catalogue: `accelerate launch train.py --config recipes/mae_fashion_mnist.yaml`."""

from hf_masked.training.cli import main

if __name__ == "__main__":
    main()
