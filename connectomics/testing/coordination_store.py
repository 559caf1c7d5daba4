"""What every coordination store keeps: create-if-absent and replace-if-match have one winner."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from connectomics.execution.coordination import CoordinationStore, Version

RACERS = 8


class CoordinationStoreContract:
    """Subclass it as ``TestMyStore``, and open a store: each call of ``store`` is that of another process.

    Examples
    --------
    >>> class TestDiskStore(CoordinationStoreContract):
    ...     def store(self, folder):
    ...         return DiskStore(folder)
    """

    def store(self, folder: Path) -> CoordinationStore:
        """Open the records that belong to a folder of the test."""
        raise NotImplementedError

    def test_what_one_makes_another_reads_and_lists(self, tmp_path: Path) -> None:
        one, two = self.store(tmp_path), self.store(tmp_path)
        assert two.read("session-a") is None and two.list("") == []
        made = one.create("session-a", b"1")
        assert made is not None
        assert two.read("session-a") == made == Version(made.number, b"1")
        assert one.create("session-b.c", b"x") is not None and one.create("lease", b"y") is not None
        assert two.list("session-") == ["session-a", "session-b.c"]

    def test_a_record_is_made_once(self, tmp_path: Path) -> None:
        one, two = self.store(tmp_path), self.store(tmp_path)
        first = one.create("name", b"one")
        assert first is not None and two.create("name", b"two") is None
        assert two.read("name") == first

    def test_only_what_was_seen_last_is_replaced(self, tmp_path: Path) -> None:
        one, two = self.store(tmp_path), self.store(tmp_path)
        first = one.create("name", b"0")
        assert first is not None
        second = two.replace("name", first, b"1")
        assert second is not None and second.number > first.number
        assert one.replace("name", first, b"2") is None, "it has changed since"
        assert one.read("name") == second
        version = second
        for value in range(2, 40):
            changed = (one, two)[value % 2].replace("name", version, str(value).encode())
            assert changed is not None
            version = changed
        assert self.store(tmp_path).read("name") == version

    def test_doing_it_again_is_a_success_where_it_was_done(self, tmp_path: Path) -> None:
        """A reply can be lost: whoever finds its own content there has made it."""
        store = self.store(tmp_path)
        first = store.create("name", b"mine")
        assert first is not None and self.store(tmp_path).create("name", b"mine") == first
        second = store.replace("name", first, b"mine again")
        assert second is not None and self.store(tmp_path).replace("name", first, b"mine again") == second

    def test_of_several_at_once_one_wins(self, tmp_path: Path) -> None:
        stores = [self.store(tmp_path) for _ in range(RACERS)]
        with ThreadPoolExecutor(RACERS) as racers:
            for number in range(20):
                name = f"race-{number}"
                made = [racers.submit(store.create, name, f"{i}".encode()) for i, store in enumerate(stores)]
                (winner,) = (future.result() for future in made if future.result() is not None)
                assert winner is not None
                changed = [racers.submit(s.replace, name, winner, f"{i}!".encode()) for i, s in enumerate(stores)]
                (last,) = (future.result() for future in changed if future.result() is not None)
                assert stores[0].read(name) == last
