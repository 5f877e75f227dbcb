"""Small parts of serving: queues, histories, the choice of a replica."""

from __future__ import annotations

import torch

from starflow2.serving.history import after, beginnings, words_first
from starflow2.serving.routing import Choice, choose, number_of
from starflow2.serving.sessions import new_id
from starflow2.serving.waiting import FairQueue


def test_owners_take_turns_however_much_one_of_them_asks():
    queue = FairQueue[str]()
    for number in range(5):
        queue.push("greedy", f"greedy {number}")
    queue.push("modest", "modest 0")
    queue.push("late", "late 0")
    assert [queue.pop() for _ in range(3)] == ["greedy 0", "modest 0", "late 0"]
    assert queue.count("greedy") == 4 and len(queue) == 4


def test_what_is_taken_out_of_the_queue_leaves_the_order_of_the_rest():
    queue = FairQueue[list[int]]()
    items = [[number] for number in range(4)]
    for item in items:
        queue.push("one", item)
    assert queue.remove(items[1]) and not queue.remove([9])
    assert [queue.pop() for _ in range(3)] == [items[0], items[2], items[3]] and queue.peek() is None


def test_a_conversation_is_known_by_its_words_and_pixels_whatever_the_blanks():
    red, blue = torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)
    first = after(b"", ["two  red", "hearts"], ["here ", red])
    assert first == after(b"", ["two red hearts"], ["here", red.clone()])
    others = [
        after(b"", ["two red hearts"], ["here", blue]),
        after(b"", ["two red hearts"], [red, "here"]),
        after(b"", ["two red hearts", red], ["here"]),
        after(b"", [], ["two red hearts here", red]),
        after(first, [], []),
    ]
    assert first not in others and len(set(others)) == len(others)
    assert beginnings([(["a"], ["b"]), (["c"], [])]) == [
        after(b"", ["a"], ["b"]),
        after(after(b"", ["a"], ["b"]), ["c"], []),
    ]
    assert words_first([red, "one", blue, "two"]) == ["one two", red, blue]


def test_a_conversation_goes_where_it_is_kept_and_the_rest_where_least_is_to_do():
    kept = new_id(2)
    assert number_of(kept) == 2 and number_of("resp_x") is None
    body = f'{{"previous_response_id": "{kept}"}}'.encode()
    assert choose("/v1/responses", body, [0, 0, 9]) == Choice(2, is_pinned=True)
    assert choose(f"/v1/responses/{kept}", b"", [0, 0, 9]) == Choice(2, is_pinned=True)
    assert choose("/v1/responses", body, [5, 4]) == Choice(1), "there is no such replica any more"
    assert {choose("/v1/score", b"%d" % i, [0, 1, 0]).number for i in range(20)} == {0, 2}, "equal ones take turns"
    assert choose("/v1/responses", b"no JSON", [5, 4]) == choose("/v1/score", body, [5, 4]) == Choice(1)


def test_a_conversation_that_is_sent_whole_always_goes_to_the_same_replica():
    first, more = '{"role": "user", "content": "a red heart"}', '{"role": "assistant", "content": "here"}'
    sent = [f'{{"messages": [{first}, {", ".join([more] * n)}]}}'.encode() for n in (1, 2, 3)]
    numbers = {choose("/v1/chat/completions", body, loads).number for body in sent for loads in ([0, 9], [9, 0])}
    assert len(numbers) == 1
    alone = f'{{"messages": [{first}]}}'.encode()
    assert [choose("/v1/chat/completions", alone, loads).number for loads in ([0, 9], [9, 0])] == [0, 1]
