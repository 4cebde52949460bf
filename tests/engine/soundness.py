"""What must hold of an engine between any two steps."""

from collections import Counter

from farthing.engine import Engine


def check_sound(engine: Engine) -> None:
    """Fail if a page is lost, held twice over, or remembered for other tokens than its own."""
    cache, scheduler = engine.cache, engine.scheduler
    held = Counter(page for s in scheduler.running for page in s.pages)
    assert cache.users == [held[page] for page in range(len(cache.users))]
    unused = [*cache._free, *cache._idle]
    assert sorted(unused) == [page for page, users in enumerate(cache.users) if not users]
    assert set(cache._idle) <= set(cache._keys)
    assert {key: page for page, key in cache._keys.items()} == {
        key: page for key, (page, _) in cache._known.items()
    }
    reading = [s for prompt in scheduler.prompts for s in prompt.samples]
    assert sorted(map(id, reading)) == sorted(id(s) for s in scheduler.running if not s.ready)
    for s in scheduler.running:
        assert not s.done
        assert len(s.pages) * cache.page_size >= s.length
        assert not s.ready or s.length == len(s.ids) - 1
    for job in scheduler.waiting:
        assert job.waiting or job.paused
        assert not any(s.pages for s in job.paused)
    assert len(scheduler.running) <= scheduler.max_batch


def check_empty(engine: Engine) -> None:
    """Fail if anything runs, waits or holds a page."""
    check_sound(engine)
    scheduler = engine.scheduler
    assert scheduler.running == scheduler.waiting == scheduler.prompts == []
    assert engine.cache.used == 0
