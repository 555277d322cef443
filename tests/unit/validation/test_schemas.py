"""What a type reads and writes: bytes are base64 everywhere, or the type is refused; secrets are not written."""

from __future__ import annotations

import base64
import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID

import pydantic.dataclasses
import pytest
from pydantic import (
    Base64Bytes,
    Base64UrlBytes,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    EncodedBytes,
    EncoderProtocol,
    Field,
    Json,
    PlainSerializer,
    PydanticUserError,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    computed_field,
    field_serializer,
    model_serializer,
    model_validator,
)
from typing_extensions import TypeAliasType, TypedDict

from rpcq.errors import ConfigurationError
from rpcq.validation.schemas import Codec, make_adapter, make_codec

ALL = bytes(range(256))
STANDARD = base64.b64encode(ALL)
URL_SAFE = base64.urlsafe_b64encode(ALL)
BASE64 = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
T = TypeVar("T")


def codec(kind: Any, *, written: bool = True) -> Codec:
    return make_codec(kind, "s.m returns", written=written)


# Bytes.


@dataclasses.dataclass
class Plain:
    data: bytes


@dataclasses.dataclass
class Encoded:
    data: Base64Bytes
    parts: list[Base64UrlBytes] = dataclasses.field(default_factory=list)


class Typed(TypedDict):
    data: Base64Bytes


class Named(NamedTuple):
    data: Base64Bytes


class Model(BaseModel):
    model_config = BASE64

    data: bytes = ALL
    children: list[Model] = []


class Inherits(Model):
    more: bytes = b""


@pydantic.dataclasses.dataclass(config=BASE64)
class Validated:
    data: bytes


class Whole(RootModel[bytes]):
    model_config = BASE64


class Generically(BaseModel, Generic[T]):
    model_config = BASE64

    value: T


Alias = TypeAliasType("Alias", "list[Base64Bytes]")

BYTES: list[tuple[Any, Any]] = [
    (bytes, ALL),
    (Base64Bytes, ALL),
    (Base64UrlBytes, ALL),
    (bytes | None, ALL),
    (Base64Bytes | None, ALL),
    (Annotated[Base64Bytes, Field(max_length=256)], ALL),
    (list[Base64Bytes], [ALL]),
    (Sequence[Base64Bytes], [ALL]),
    (tuple[int, Base64UrlBytes], (1, ALL)),
    (set[bytes], {ALL}),
    (dict[str, dict[str, Base64Bytes]], {"a": {"b": ALL}}),
    (dict[bytes, bytes], {ALL: ALL}),
    (Alias, [ALL]),
    (Plain, Plain(ALL)),
    (list[Plain], [Plain(ALL)]),
    (Encoded, Encoded(ALL, [ALL])),
    (dict[str, Encoded], {"a": Encoded(ALL, [ALL])}),
    (Typed, {"data": ALL}),
    (Named, Named(ALL)),
    (Model, Model(children=[Model(data=b"\xff")])),
    (list[Inherits], [Inherits(more=ALL)]),
    (Validated, Validated(ALL)),
    (Whole, Whole(ALL)),
    (Generically[bytes], Generically[bytes](value=ALL)),
    (Typed | list[Base64Bytes], [ALL]),
]


@pytest.mark.parametrize(("kind", "value"), BYTES, ids=lambda it: str(it)[:60])
def test_bytes_of_every_value_are_base64_in_every_type(kind: Any, value: Any) -> None:
    it = codec(kind)
    body = it.write(it.check(value), by_alias=True)
    assert URL_SAFE in body or b'"_w=="' in body
    assert it.read(body) == value
    assert it.read(body.replace(URL_SAFE, STANDARD)) == value
    assert it.read(body.replace(URL_SAFE, URL_SAFE.rstrip(b"="))) == value


@pytest.mark.parametrize("kind", [bytes, Base64Bytes, Base64UrlBytes])
@pytest.mark.parametrize("text", [b'"@@@@"', b'"a"', b'"+_8="', b'"YWJj!"', b'"YWJj\\n"', b'"YW=Jj"', b"5", b"null"])
def test_what_is_no_base64_is_refused(kind: Any, text: bytes) -> None:
    with pytest.raises(pydantic.ValidationError):
        codec(kind).read(text)


@pytest.mark.parametrize("length", range(8))
def test_bytes_of_every_length_and_padding_come_back(length: int) -> None:
    for value in (b"\xff" * length, b"\x00" * length, b"YWJj" * length):
        for kind in (bytes, Base64Bytes, Base64UrlBytes):
            it = codec(kind)
            assert it.read(it.write(it.check(value))) == value


class Silent(BaseModel):
    data: bytes


class HalfSaid(BaseModel):
    model_config = ConfigDict(val_json_bytes="base64")

    data: bytes


class Contradictory(BaseModel):
    model_config = ConfigDict(val_json_bytes="base64", ser_json_bytes="hex")

    data: bytes


@pydantic.dataclasses.dataclass
class SilentToo:
    data: bytes


class SilentDict(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    data: bytes


class SilentRoot(RootModel[list[bytes]]):
    """Its own config says nothing."""


class Outer(BaseModel):
    model_config = BASE64

    inner: dict[str, list[Silent]]


class SilentSecret(BaseModel):
    data: SecretBytes


@pytest.mark.parametrize(
    ("kind", "place", "owner"),
    [
        (Silent, "data", "Silent"),
        (list[Silent | None], "data", "Silent"),
        (HalfSaid, "data", "HalfSaid"),
        (Contradictory, "data", "Contradictory"),
        (SilentToo, "data", "SilentToo"),
        (SilentDict, "data", "SilentDict"),
        (SilentRoot, "root", "SilentRoot"),
        (Outer, "inner.data", "Silent"),
        (SilentSecret, "data", "SilentSecret"),
    ],
)
def test_a_class_that_does_not_say_how_its_bytes_stand_in_json_is_refused(kind: Any, place: str, owner: str) -> None:
    said = (
        rf"s\.m takes {place}, bytes of {owner}, whose config does not say how they are written in JSON; "
        rf"give {owner} ConfigDict\(ser_json_bytes='base64', val_json_bytes='base64'\)"
    )
    with pytest.raises(ConfigurationError, match=said):
        make_codec(kind, "s.m takes", written=False)


class EncodedSilent(BaseModel):
    data: Base64Bytes


class EncodedUrlSilent(BaseModel):
    data: Base64UrlBytes


class EncodedTwice(BaseModel):
    model_config = BASE64

    data: Base64Bytes


@pytest.mark.parametrize("kind", [EncodedSilent, EncodedUrlSilent, EncodedTwice, list[EncodedTwice]])
def test_encoded_bytes_that_would_be_misread_are_refused(kind: Any) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"data, encoded bytes of Encoded\w+, which would misread some base64; annotate it as bytes, and give",
    ):
        codec(kind)


class Text(BaseModel):
    model_config = ConfigDict(ser_json_bytes="utf8", val_json_bytes="utf8")

    data: bytes


class Hex(BaseModel):
    model_config = ConfigDict(ser_json_bytes="hex", val_json_bytes="hex")

    data: bytes


def _from_hex(value: Any) -> Any:
    return bytes.fromhex(value) if isinstance(value, str) else value


class OwnWay(BaseModel):
    data: Annotated[bytes, PlainSerializer(bytes.hex), BeforeValidator(_from_hex)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(Text(data=b"abc"), "abc"), (Hex(data=b"\xff"), "ff"), (OwnWay(data=b"\xff"), "ff")],
    ids=repr,
)
def test_a_class_that_says_how_its_bytes_stand_in_json_has_its_way(value: BaseModel, text: str) -> None:
    it = codec(type(value))
    assert it.write(value) == f'{{"data":"{text}"}}'.encode()
    assert it.read(it.write(value)) == value


class Swapped(EncoderProtocol):
    @classmethod
    def decode(cls, data: bytes) -> bytes:
        return data[::-1]

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value[::-1]

    @classmethod
    def get_json_format(cls) -> Literal["swapped"]:
        return "swapped"


def test_bytes_with_an_encoding_of_the_users_keep_it_inside_base64() -> None:
    it = codec(list[Annotated[bytes, EncodedBytes(encoder=Swapped)]])
    assert it.write([b"\xff\x00"]) == b'["AP8="]'
    assert it.read(b'["AP8="]') == [b"\xff\x00"]


# Secrets.


class Account(BaseModel):
    name: str = ""
    password: SecretStr


class Tree(BaseModel):
    kids: dict[str, list[Tree]] = {}
    account: Account | None = None


class Birthday(Secret[date]):
    """A secret of another kind."""


class Tokens(BaseModel):
    @computed_field  # type: ignore[prop-decorator]
    @property
    def token(self) -> SecretStr:
        return SecretStr("hidden")


class AwkwardNames(BaseModel):
    type: int = 0
    config: int = 0
    default: int = 0
    serialization: int = 0
    metadata: SecretStr | None = None


@dataclasses.dataclass
class Login:
    token: SecretStr | None = None


class Keys(TypedDict, total=False):
    key: SecretBytes


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (SecretStr, "root"),
        (SecretBytes, "root"),
        (Secret[int], "root"),
        (Birthday, "root"),
        (SecretStr | None, "root"),
        (Annotated[SecretStr, Field(min_length=1)], "root"),
        (list[tuple[int, SecretStr]], "root"),
        (Sequence[SecretStr], "root"),
        (dict[SecretStr, int], "root"),
        (Json[SecretStr], "root"),
        (Account, "password"),
        (list[Account | int], "password"),
        (Tree, "account.password"),
        (Generically[Secret[str]], "value"),
        (Generically[list[Account]], "value.password"),
        (Login, "token"),
        (Keys, "key"),
        (Tokens, "token"),
        (AwkwardNames, "metadata"),
    ],
)
def test_a_type_with_a_secret_is_refused_where_it_is_written_and_taken_where_it_is_read(kind: Any, place: str) -> None:
    said = rf"s\.m returns {place}, a secret, which would arrive as asterisks; .* return secret\.get_secret_value\(\)"
    with pytest.raises(ConfigurationError, match=said):
        codec(kind)
    assert codec(kind, written=False)


class Shown(BaseModel):
    password: SecretStr

    @field_serializer("password", when_used="json")
    def show(self, value: SecretStr) -> str:
        return value.get_secret_value()


class ShownWhole(BaseModel):
    password: SecretStr

    @model_serializer
    def show(self) -> dict[str, str]:
        return {"password": self.password.get_secret_value()}


class LeftOut(BaseModel):
    password: SecretStr = Field(SecretStr("default"), exclude=True)


@pytest.mark.parametrize("kind", [Shown, ShownWhole, LeftOut, list[Shown], dict[str, LeftOut]])
def test_a_secret_that_its_class_writes_as_it_is_or_leaves_out_is_not_refused(kind: Any) -> None:
    assert codec(kind)
    assert codec(Shown).write(Shown(password=SecretStr("told"))) == b'{"password":"told"}'


def test_a_secret_is_read_from_its_plain_value() -> None:
    assert codec(SecretStr, written=False).read(b'"told"').get_secret_value() == "told"
    assert codec(SecretBytes, written=False).read(b'"_w=="').get_secret_value() == b"\xff"
    assert codec(list[Secret[int]], written=False).read(b"[5]")[0].get_secret_value() == 5


# Floats.


class Colour(Enum):
    RED = 1


class Floatless(BaseModel):
    x: int
    colour: Colour = Colour.RED
    at: datetime | None = None
    price: Decimal = Decimal(1)
    tags: list[dict[str, UUID]] = []


class Half(Floatless):
    half: float = 0.5


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    x: int


class Made(BaseModel):
    x: int

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


class Before(BaseModel):
    x: int

    @model_validator(mode="before")
    @classmethod
    def look(cls, value: Any) -> Any:
        return value


class Computing(BaseModel):
    x: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def half(self) -> float:
        return self.x / 2


@pytest.mark.parametrize(
    "kind", [int, str, bytes, Decimal, Floatless, list[Floatless | None], SecretStr, Base64Bytes, Computing]
)
def test_a_type_without_floats_is_known(kind: Any) -> None:
    assert not codec(kind, written=False).floats


@pytest.mark.parametrize(
    "kind",
    [
        *(float, complex, Any, object, list, dict[str, Any], int | float, Half, Open, Made, Before, Iterable[int]),
        Json[Any],
        Annotated[int, BeforeValidator(int)],
        Annotated[Decimal, Field(allow_inf_nan=True)],
    ],
)
def test_a_type_in_which_a_number_may_become_a_float_is_known(kind: Any) -> None:
    assert codec(kind).floats


# Functions, and types that pydantic has no schema for.


def test_a_function_takes_its_arguments_from_json() -> None:
    def take(*args: Any, **named: Any) -> Any:
        return args, named

    kinds = inspect.Parameter
    take.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kinds("x", kinds.POSITIONAL_OR_KEYWORD, annotation=int),
            kinds("data", kinds.KEYWORD_ONLY, annotation=Base64Bytes, default=b""),
            kinds("more", kinds.VAR_KEYWORD, annotation=bytes),
        ]
    )
    take.__annotations__ = {"x": int, "data": Base64Bytes, "more": bytes}
    read = make_codec(take, "s.m takes", written=False).read
    assert read(b'{"x": "5", "data": "%b", "other": "%b"}' % (URL_SAFE, STANDARD)) == (
        (),
        {"x": 5, "data": ALL, "other": ALL},
    )
    assert read(b"[5]") == ((5,), {"data": b""})


class Deferred(BaseModel):
    model_config = ConfigDict(defer_build=True)

    data: Later  # noqa: F821 - what is tested


def test_a_class_that_is_made_when_it_is_first_used_is_looked_at_as_well() -> None:
    with pytest.raises((PydanticUserError, NameError)):
        codec(Deferred)
    Deferred.model_rebuild(_types_namespace={"Later": SecretStr})
    with pytest.raises(ConfigurationError, match="data, a secret"):
        codec(Deferred)


class Link(BaseModel):
    value: int
    next: Link | None = None


def test_a_recursive_model_can_be_used_any_number_of_times() -> None:
    """Pydantic keeps a model's schema: what was written into it once made every thousandth use fail."""
    for _ in range(5000):
        make_adapter(Link)
