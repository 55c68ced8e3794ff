"""Pretrains a method of the catalogue: `accelerate launch train.py --config recipes/mae_fashion_mnist.yaml`."""

from hf_masked.training.cli import main
from hf_masked.training.launch import disconnect

if __name__ == "__main__":
    main()
    disconnect()
