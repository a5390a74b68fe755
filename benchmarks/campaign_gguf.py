"""Whether llama.cpp's converter makes of our exports what it makes of the original: every tensor and every key of the GGUF file.

    pip download --no-deps --no-binary :all: llama-cpp-python     # or a checkout of llama.cpp; needs sentencepiece, which the converter imports
    python benchmarks/campaign_gguf.py LLAMA_CPP

LLAMA_CPP holds convert_hf_to_gguf.py and gguf-py. Two random models with a tokenizer in Llama's form (the converter refuses others that it does not know by
name) are imported at TP2 x PP2, exported, and converted beside the original; nothing else of llama.cpp runs.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
NAMES = ("llama", "mistral")
NEW = {"general.base_model.count", "general.base_model.0.name", "GGUF.kv_count"}  # from the model card that an export has


def tokenizer():
    """Words of two letters, and bytes: a BPE with byte fallback, as Llama 2 has."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pairs = [(first, second) for first in "bcdfghkl" for second in "aeiou"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(97, 123)), *(a + b for a, b in pairs)]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(words[:3])
    return made, len(words)


def original(name: str, folder: Path) -> None:
    import hugging_face as hf

    made, words = tokenizer()
    settings = {**hf.CASES[name].settings, "vocab_size": words, "bos_token_id": 1, "eos_token_id": 2}
    if "head_dim" not in settings:
        settings |= {"hidden_size": 64, "num_attention_heads": 8}
    hf.save(replace(hf.CASES[name], settings=settings), folder)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path)
    place = parser.parse_args().llama_cpp.resolve()
    sys.path.insert(0, str(place / "gguf-py"))
    import gguf
    import numpy as np

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{place / 'gguf-py'}", "OMP_NUM_THREADS": "1"}

    def run(*words: object) -> None:
        subprocess.run([sys.executable, "-W", "ignore", *map(str, words)], env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def read(file: Path) -> tuple[dict, dict]:
        reader = gguf.GGUFReader(file)
        return {name: field.contents() for name, field in reader.fields.items()}, {tensor.name: tensor.data for tensor in reader.tensors}

    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            top = Path(folder) / name
            original(name, top / "hf")
            run("-m", "megatron_ext", "convert", f"hf={top / 'hf'}", f"output={top / 'ours'}", "parallel.tp=2", "parallel.pp=2")
            run("-m", "megatron_ext", "convert", f"checkpoint.load={top / 'ours'}", f"output={top / 'back'}")
            for kind in ("hf", "back"):
                run(place / "convert_hf_to_gguf.py", top / kind, "--outfile", top / f"{kind}.gguf", "--outtype", "f32", "--model-name", "x")
            (keys, tensors), (our_keys, our_tensors) = read(top / "hf.gguf"), read(top / "back.gguf")
            differ = sorted(key for key in (keys.keys() | our_keys.keys()) - NEW if keys.get(key) != our_keys.get(key))
            same = [key for key in tensors if key in our_tensors and np.array_equal(tensors[key], our_tensors[key])]
            print(f"{name}: {len(same)} of {len(tensors)} tensors the same, {len(our_tensors)} in ours; keys that differ: {', '.join(differ) or 'none'}")
            wrong += bool(differ) or not len(same) == len(tensors) == len(our_tensors)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
