"""The only room that knows peers' formats: PEFT adapter folders, Hugging Face checkpoints, the transformers Trainer."""
