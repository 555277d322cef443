"""What is known of uploads and steps. Each method is one transaction, and blocks: call it in a thread."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Session

from examples.media.steps import STEPS, Kind
from examples.media.tables import Fault, Notice, StepRow, Upload, open_database
from rpcq import GiveUp
from rpcq.outbox import Outbox


def folder() -> Path:
    """The folder of `MEDIA_FOLDER`."""
    return Path(os.environ.get("MEDIA_FOLDER", "media"))


class Books:
    """The uploads, and how far they are.

    Args:
        folder: where the database is.

    Attributes:
        outbox: has the notices that are to be sent. Who opens it sends them.

    """

    def __init__(self, folder: Path) -> None:
        self._engine = open_database(folder)
        self.outbox = Outbox(self._engine)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    # For the web app.

    def add(self, kind: Kind, name: str, size: int, upload: str) -> None:
        """Note an upload and its steps, none of which is sent."""
        now = time.time()
        with Session(self._engine) as db, db.begin():
            db.add(Upload(id=upload, kind=kind, name=name, size=size, created=now, left=len(STEPS[kind])))
            db.add_all([StepRow(upload=upload, name=step.name) for step in STEPS[kind]])

    def unsent(self, limit: int) -> Sequence[tuple[str, str]]:
        """Upload and step of what is to be sent, the oldest first."""
        with Session(self._engine) as db:
            found = (
                select(StepRow.upload, StepRow.name)
                .join(Upload, Upload.id == StepRow.upload)
                .where(StepRow.sent.is_(None))
                .order_by(Upload.created, StepRow.upload)
                .limit(limit)
            )
            return [(upload, name) for upload, name in db.execute(found)]

    def sent(self, upload: str, name: str, job: str) -> None:
        """Note that the broker has the job of a step."""
        with Session(self._engine) as db, db.begin():
            db.execute(update(StepRow).where(*_one(upload, name)).values(sent=time.time(), job=job))

    def latest(self, limit: int) -> Sequence[tuple[Upload, Sequence[StepRow]]]:
        """The latest uploads with their steps, the newest first."""
        with Session(self._engine) as db:
            uploads = db.scalars(select(Upload).order_by(Upload.created.desc(), Upload.id).limit(limit)).all()
            steps = db.scalars(select(StepRow).where(StepRow.upload.in_([upload.id for upload in uploads]))).all()
        by_key = {(step.upload, step.name): step for step in steps}
        return [(upload, [by_key[upload.id, step.name] for step in STEPS[_kind(upload)]]) for upload in uploads]

    def counts(self) -> tuple[int, int]:
        """How many uploads there are, and how many of them have all that is made of them."""
        with Session(self._engine) as db:
            number, complete = db.execute(
                select(func.count(), func.count().filter(Upload.left == 0)).select_from(Upload)
            ).one()
        return number, complete

    def notices(self, limit: int | None = None) -> Sequence[Notice]:
        """What users were told, the latest first."""
        with Session(self._engine) as db:
            return db.scalars(select(Notice).order_by(Notice.id.desc()).limit(limit)).all()

    def uploads(self) -> set[str]:
        """The IDs of all uploads."""
        with Session(self._engine) as db:
            return set(db.scalars(select(Upload.id)))

    # For the steps.

    def begin(self, upload: str, name: str, attempt: int) -> bool:
        """Note that a step begins; returns False if it is done already.

        Raises:
            GiveUp: there is no such upload.

        """
        mine = {"began": time.time(), "worker": os.getpid(), "attempt": attempt, "runs": StepRow.runs + 1}
        with Session(self._engine) as db, db.begin():
            mark = update(StepRow).where(*_one(upload, name), StepRow.done.is_(None)).values(mine | {"error": None})
            if db.execute(mark.returning(StepRow.name)).one_or_none():
                return True
            if db.get(StepRow, (upload, name)) is None:
                raise GiveUp(f"there is no step {name!r} of an upload {upload!r}")
            return False

    def fail(self, upload: str, name: str, error: str) -> None:
        """Note why an attempt failed."""
        with Session(self._engine) as db, db.begin():
            not_done = *_one(upload, name), StepRow.done.is_(None)
            db.execute(update(StepRow).where(*not_done).values(error=error))

    def finish(self, upload: str, name: str, size: int) -> bool:
        """Note that the file of a step is there; with the last step of an upload, have its user notified.

        It is one transaction. Only the first one that finishes a step counts it. And whoever counts changes the row of
        the upload, so that two do it one after the other: exactly one of them brings `left` to 0.

        Returns:
            False if the step was done already.

        """
        with Session(self._engine) as db, db.begin():
            not_done = *_one(upload, name), StepRow.done.is_(None)
            mark = update(StepRow).where(*not_done).values(done=time.time(), size=size, error=None)
            if db.execute(mark.returning(StepRow.name)).one_or_none() is None:
                return False
            count = update(Upload).where(Upload.id == upload).values(left=Upload.left - 1).returning(Upload.left)
            if db.scalars(count).one() == 0:
                keyed = self.outbox.with_options(idempotency_key=f"{upload}.notify")
                keyed.send(db, "notices.notify", upload=upload)
            return True

    # For the notices.

    def notify(self, upload: str) -> None:
        """Tell the user that all files are there, once: the mark and the notice are one transaction.

        Raises:
            GiveUp: there is no such upload.

        """
        now = time.time()
        with Session(self._engine) as db, db.begin():
            mark = update(Upload).where(Upload.id == upload, Upload.notified.is_(None)).values(notified=now)
            name = db.scalars(mark.returning(Upload.name)).one_or_none()
            if name is not None:
                db.add(Notice(upload=upload, text=f"{name} is ready", at=now))
            elif db.get(Upload, upload) is None:
                raise GiveUp(f"there is no upload {upload!r}")

    # Faults.

    def faults(self) -> set[str]:
        """The steps that are made to fail."""
        with Session(self._engine) as db:
            return set(db.scalars(select(Fault.step)))

    def set_fault(self, step: str, *, fails: bool) -> None:
        """Make each attempt of a step fail, or no longer."""
        with Session(self._engine) as db, db.begin():
            if fails:
                db.execute(insert(Fault).values(step=step).on_conflict_do_nothing())
            else:
                db.execute(delete(Fault).where(Fault.step == step))


def new_id() -> str:
    """An ID for an upload."""
    return uuid4().hex


def _one(upload: str, name: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return StepRow.upload == upload, StepRow.name == name


def _kind(upload: Upload) -> Kind:
    return "picture" if upload.kind == "picture" else "video"
