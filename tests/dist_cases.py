"""A program for tests of several processes: it trains a stage of the tiny model as its arguments say, and tells what came of it.

    torchrun ... dist_cases.py FOLDER STAGE '{"steps": 20, "shard": {"mode": "fsdp"}}'

Its words are JSON lines in FOLDER/told-RANK.jsonl: losses, and a digest of what the run left.
"""
