"""Task files for the tests of the harness: questions with choices, a text longer than the context, and completions."""
import json
import random
from pathlib import Path

FILES = {
    "colours.yaml": """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {train: data/train.jsonl, test: data/test.jsonl}}
training_split: train
fewshot_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "letters.yaml": """
include: colours.yaml
task: letters
doc_to_text: "{{question | trim}} "
doc_to_choice: ["A", "B", "C", "D"]
""",
    "empty.yaml": """
include: colours.yaml
task: empty
doc_to_text: ""
""",
    "prose.yaml": """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: data/prose.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "finish.yaml": """
task: finish
dataset_path: json
dataset_kwargs: {data_files: {test: data/finish.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n", " the"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "suite.yaml": """
group: suite
task: [colours, letters]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
""",
}
TASKS = ("suite", "empty", "prose", "finish")
LEAVES = ("colours", "letters", "empty", "prose", "finish")
TEXT = "return self value def import class none true list string number file path error the a in of and"


def write(directory: Path) -> Path:
    """The task files and their data; returns `directory`."""
    drawn = random.Random(3)

    def text(count: int) -> str:
        return " ".join(drawn.choice(TEXT.split()) for _ in range(count))

    def question(_) -> dict:
        return {"question": text(drawn.randint(2, 9)), "choices": [text(drawn.randint(1, 4)) for _ in range(4)], "answer": drawn.randrange(4)}

    data = {
        "train": [question(k) for k in range(6)],
        "test": [question(k) for k in range(13)],
        "prose": [{"text": text(count)} for count in (1, 30, 45, 200)] + [{"text": "naïve 서울 — ünïcode\n\n  spaces  "}],
        "finish": [{"prompt": text(count), "target": text(3)} for count in (1, 2, 3, 5, 8, 13, 90)],  # the last one does not fit
    }
    (directory / "data").mkdir(parents=True)
    for name, rows in data.items():
        (directory / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, content in FILES.items():
        (directory / name).write_text(content.lstrip(), encoding="utf-8")
    return directory
