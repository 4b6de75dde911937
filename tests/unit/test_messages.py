"""The table of handlers, and messages in a run without MPI."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from jd_hpc import JobDispatcher, JobError, MessageError
from jd_hpc.messages import WAITING_MOST, Handlers, LocalPost


class Animal(NamedTuple):
    name: str


class Dog(Animal):
    pass


def test_the_first_that_fits_gets_it():
    seen = []
    handlers = Handlers()
    handlers.add(Dog, lambda source, dog: seen.append(("dog", source, dog.name)), None)
    handlers.add(Animal, lambda source, animal: seen.append(("animal", source, animal.name)), None)
    handlers.add(object, lambda source, thing: seen.append(("thing", source, thing)), None)
    for source, message in enumerate([Dog("a"), Animal("b"), 7]):
        assert handlers.handle(source, message) == []
    assert seen == [("dog", 0, "a"), ("animal", 1, "b"), ("thing", 2, 7)]


def test_filters_decide():
    seen = []
    handlers = Handlers()
    handlers.add(int, lambda source, number: seen.append(("even", number)), lambda source, number: number % 2 == 0)
    handlers.add(int, lambda source, number: seen.append(("of 3", number)), lambda source, number: source == 3)
    for source, number in [(1, 2), (3, 5), (1, 7)]:
        handlers.handle(source, number)
    assert seen == [("even", 2), ("of 3", 5)]  # nobody wanted the 7


def test_adding_the_same_again_changes_nothing():
    class Owner:
        def __init__(self):
            self.count = 0

        def hear(self, source, message):
            self.count += 1

    owner, handlers = Owner(), Handlers()
    for _ in range(3):
        handlers.add(int, owner.hear, None)
    handlers.handle(0, 1)
    assert owner.count == 1
    assert len(handlers._table) == 1


@pytest.mark.parametrize("replies", [[(1, "a"), (2, "b")], ((1, "a"), (2, "b")), {1: "a", 2: "b"}.items()])
def test_replies(replies):
    handlers = Handlers()
    handlers.add(int, lambda source, number: replies, None)
    assert handlers.handle(0, 1) == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("reply", [7, [1, 2], [(1, 2, 3)], True])
def test_replies_that_are_none(reply):
    handlers = Handlers()
    handlers.add(int, lambda source, number: reply, None)
    with pytest.raises(MessageError, match=r"return None, or a list of pairs \(destination, message\)"):
        handlers.handle(0, 1)


def test_nobody_handles_it():
    handlers = Handlers()
    handlers.add(int, print, None)
    with pytest.raises(MessageError, match=r"no handler here for a message of type .*test_messages\.Dog, from rank 3"):
        handlers.handle(3, Dog("a"))


def test_bad_handlers_are_refused():
    dispatcher = JobDispatcher()
    for wrong in [("int", print), (int, 7), (int, print, 7), ([int], print)]:
        with pytest.raises(TypeError, match="add_handler"):
            dispatcher.add_handler(*wrong)


class Sweep(JobDispatcher):
    def __init__(self, **options):
        super().__init__(**options)
        self.add_handler(tuple, self.hear)

    def reset(self):
        self.todo = list(range(5))
        self.events = []

    def next_job(self):
        return self.todo.pop(0) if self.todo else None

    def process_job(self, job):
        self.tell(("told", job))
        self.events.append(("after tell", job))
        return job

    def hear(self, source, message):
        assert source == 0
        self.events.append(message)

    def process_result(self, index, job, result):
        self.events.append(("result", job))

    def postprocess(self):
        return self.events


@pytest.mark.parametrize("grain", [1, 2])
def test_a_job_that_tells_is_heard_at_once(grain):
    events = Sweep(grain=grain).run()
    for job in range(5):
        assert [what for what, number in events if number == job] == ["told", "after tell", "result"]


def test_hooks_are_heard_after_the_hook():
    class Hooks(Sweep):
        def process_result(self, index, job, result):
            self.tell(("from hook", job))
            super().process_result(index, job, result)

    events = Hooks().run()
    for job in range(5):
        assert [what for what, number in events if number == job] == ["told", "after tell", "result", "from hook"]


def test_the_last_hooks_message_may_make_a_job():
    class More(Sweep):
        def process_result(self, index, job, result):
            super().process_result(index, job, result)
            if job == 4:
                self.tell(("more", 100))

        def hear(self, source, message):
            super().hear(source, message)
            if message[0] == "more":
                self.todo.append(message[1])

    assert ("result", 100) in More().run()


def test_a_resume_hears_the_hooks_too(tmp_path):
    class More(Sweep):
        def process_job(self, job):
            return job

        def process_result(self, index, job, result):
            self.tell(("more" if job == 4 else "from hook", 100 + job))

        def hear(self, source, message):
            super().hear(source, message)
            if message[0] == "more":
                self.todo.append(message[1])

    events = More().run(tmp_path / "journal")
    assert ("from hook", 204) in events
    assert More().run(tmp_path / "journal") == events


def test_replies_to_oneself_are_handled_after_the_handler():
    class Echo(Sweep):
        def hear(self, source, message):
            super().hear(source, message)
            if message[0] == "told":
                replies = [(0, ("reply", message[1]))]
                self.events.append(("handler ends", message[1]))
                return replies
            return None

    events = Echo().run()
    assert [what for what, number in events if number == 3] == ["told", "handler ends", "reply", "after tell", "result"]


def test_there_is_nobody_else():
    class Wrong(Sweep):
        def process_job(self, job):
            assert self.broadcast(("all", job)) == 0
            assert self.poll() == 0
            self.tell("x", 1)

    with pytest.raises(JobError, match="there is no rank 1"):
        Wrong().run()


def test_only_in_a_run():
    sweep = Sweep()
    for call in (lambda: sweep.tell(()), lambda: sweep.broadcast(()), sweep.poll):
        with pytest.raises(MessageError, match="there is none now"):
            call()
    sweep.run()
    with pytest.raises(MessageError, match="there is none now"):
        sweep.tell(())


def test_in_a_process_of_its_own_it_is_refused():
    with pytest.raises(JobError, match="isolate=True"):
        Sweep(isolate=True).run()


def test_a_hook_cannot_leave_any_number_behind():
    post = LocalPost(Handlers())
    for _ in range(WAITING_MOST):
        post.tell(1)
    with pytest.raises(MessageError, match="in one hook"):
        post.tell(1)
