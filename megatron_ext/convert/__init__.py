"""Hugging Face directories into checkpoints of our own kind, and back (docs/convert.md).

    config.json  <->  ModelConfig            families/: one file a family, its tensors declared as a table
    *.safetensors <-> shard_*.bin            tensors are streamed; nothing is unpickled, no model is built
    tokenizer, generation config, licence    carried along, and named in the checkpoint's record by their hashes
"""
