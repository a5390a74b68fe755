"""Data for SFT and the reward stage: built from documents and questions with answers, augmented by a model, ranked by people
(docs/collect.md).

    sources.py, cut.py, build.py    documents and Q-A files to prompts and answers, each with where it came from
    templates.py ... augment.py     more of them, written by a model: over an OpenAI-compatible endpoint, or a checkpoint of our own
    tasks.py, desk.py, server.py    answers to one prompt side by side, ordered by people on a page
    agreement.py, progress.py       how far people agree, and how far there is to go
    export.py                       what the reward stage reads

No torch but in own.py.
"""
