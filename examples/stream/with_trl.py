"""TRL's trainer on a stream, as a `datasets.IterableDataset`: packed already, so that TRL does
nothing to it.

python examples/tiny_model.py --output demo/model && python examples/stream/with_trl.py
"""

from typing import Any

from trl import SFTConfig, SFTTrainer

from sftprep.stream import open_stream


def main(
    model_folder: str = "demo/model", data: str = "examples/data/qa.jsonl", output: str = "demo/trl"
) -> float:
    """Train for three steps; the loss."""
    packs = open_stream(data, tokenizer=model_folder, max_length=512, lanes=4).to_hf(epochs=None)

    def labelled(row: dict[str, Any]) -> dict[str, Any]:
        labels = [
            i if trained else -100
            for i, trained in zip(row["input_ids"], row["completion_mask"], strict=True)
        ]
        return {"input_ids": row["input_ids"], "labels": labels, "seq_lengths": row["seq_lengths"]}

    trainer = SFTTrainer(
        model_folder,
        # padding_free: TRL's collator begins the position ids anew at each of seq_lengths.
        args=SFTConfig(
            output_dir=output,
            max_steps=3,
            per_device_train_batch_size=2,
            padding_free=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=packs.map(labelled, remove_columns=packs.column_names),
    )
    return float(trainer.train().training_loss)


if __name__ == "__main__":
    print("loss:", main())
