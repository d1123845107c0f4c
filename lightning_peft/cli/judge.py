"""`lightning-peft judge`: how far a judge of answers can be trusted."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.cli.arguments import one_sentence, parser


def main(args: list[str]) -> None:
    """Hold a judge against people's verdicts on held-out questions, and print and save what comes of it."""
    options = parser(
        "judge",
        "Accuracy, ranking and calibration of a judge on questions that it was not trained on. The split is that of "
        "the training for the same seed and fractions. A judge's folder gets the result as judge.json.",
    )
    options.add_argument("judge", help="an adapter folder, or a model's folder or name on the hub")
    options.add_argument("--data", required=True, help="finetune_truth.jsonl or finetune_info.jsonl")
    options.add_argument("--base", help="the adapter's base model; default the one that its folder names")
    options.add_argument("--limit", type=int, help="only so many held-out judgements, drawn with the seed")
    options.add_argument("--test_fraction", type=float, default=0.2, help="share of the questions held out")
    options.add_argument("--val_fraction", type=float, default=0.1, help="share of the questions for validation")
    options.add_argument("--seed", type=int, default=0, help="of the split")
    options.add_argument("--batch_size", type=int, default=16, help="answers a forward pass")
    parsed = options.parse_args(args[1:])
    with one_sentence("judge"):
        from rich.console import Console

        from lightning_peft.truthfulqa.judges import LanguageModelJudge, judge_quality, load_judgements, save_quality
        from lightning_peft.truthfulqa.judges.datamodule import draw
        from lightning_peft.truthfulqa.judges.protocol import split_by_question

        parts = split_by_question(load_judgements(parsed.data), parsed.test_fraction, parsed.val_fraction, parsed.seed)
        held_out = draw(parts[2], parsed.limit, parsed.seed)
        kind = held_out[0].kind
        if (Path(parsed.judge) / "adapter_config.json").is_file():
            judge = LanguageModelJudge.from_adapter(parsed.judge, kind, parsed.base, batch_size=parsed.batch_size)
        else:
            judge = LanguageModelJudge.from_pretrained(parsed.judge, kind, batch_size=parsed.batch_size)
        quality = judge_quality(judge, held_out)
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"{quality.kind}: {quality.judgements} judgements on {quality.questions} held-out questions")
        for name, value in (
            ("accuracy", quality.accuracy),
            ("majority class", quality.majority),
            ("AUROC", quality.auroc),
            ("ECE (15 bins)", quality.ece),
            ("Brier", quality.brier),
            ("sensitivity", quality.confusion.sensitivity),
            ("specificity", quality.confusion.specificity),
        ):
            console.print(f"  {name:15} {value:.4f}")
        if Path(parsed.judge).is_dir():
            console.print(f"Wrote {save_quality(quality, parsed.judge)}.")
