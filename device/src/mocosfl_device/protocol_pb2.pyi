from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServerMessage(_message.Message):
    __slots__ = ("hello", "welcome", "order", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    order: Order
    goodbye: Goodbye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., order: _Optional[_Union[Order, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("join", "ready", "latents", "weights", "heartbeat", "goodbye")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    join: Join
    ready: Ready
    latents: Latents
    weights: Weights
    heartbeat: Heartbeat
    goodbye: Goodbye
    def __init__(self, join: _Optional[_Union[Join, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., latents: _Optional[_Union[Latents, _Mapping]] = ..., weights: _Optional[_Union[Weights, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "nonce", "software")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    nonce: bytes
    software: str
    def __init__(self, protocol: _Optional[int] = ..., nonce: _Optional[bytes] = ..., software: _Optional[str] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("protocol", "nonce", "client", "token", "images", "capabilities", "software")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    nonce: bytes
    client: int
    token: str
    images: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    software: str
    def __init__(self, protocol: _Optional[int] = ..., nonce: _Optional[bytes] = ..., client: _Optional[int] = ..., token: _Optional[str] = ..., images: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., software: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("client", "settings", "heartbeat", "frozen")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    client: int
    settings: str
    heartbeat: float
    frozen: bool
    def __init__(self, client: _Optional[int] = ..., settings: _Optional[str] = ..., heartbeat: _Optional[float] = ..., frozen: bool = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("images", "sums", "squares")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    images: int
    sums: _containers.RepeatedScalarFieldContainer[int]
    squares: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, images: _Optional[int] = ..., sums: _Optional[_Iterable[int]] = ..., squares: _Optional[_Iterable[int]] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("gradients", "collect", "weights", "draw")
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    COLLECT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DRAW_FIELD_NUMBER: _ClassVar[int]
    gradients: Gradients
    collect: Collect
    weights: Weights
    draw: Draw
    def __init__(self, gradients: _Optional[_Union[Gradients, _Mapping]] = ..., collect: _Optional[_Union[Collect, _Mapping]] = ..., weights: _Optional[_Union[Weights, _Mapping]] = ..., draw: _Optional[_Union[Draw, _Mapping]] = ...) -> None: ...

class Gradients(_message.Message):
    __slots__ = ("step", "lr", "query")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    step: int
    lr: float
    query: Tensor
    def __init__(self, step: _Optional[int] = ..., lr: _Optional[float] = ..., query: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Collect(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Weights(_message.Message):
    __slots__ = ("number", "tensors", "restart")
    class TensorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    number: int
    tensors: _containers.MessageMap[str, Tensor]
    restart: bool
    def __init__(self, number: _Optional[int] = ..., tensors: _Optional[_Mapping[str, Tensor]] = ..., restart: bool = ...) -> None: ...

class Draw(_message.Message):
    __slots__ = ("step", "first")
    STEP_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    step: int
    first: int
    def __init__(self, step: _Optional[int] = ..., first: _Optional[int] = ...) -> None: ...

class Latents(_message.Message):
    __slots__ = ("step", "query", "key")
    STEP_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    step: int
    query: Tensor
    key: Tensor
    def __init__(self, step: _Optional[int] = ..., query: _Optional[_Union[Tensor, _Mapping]] = ..., key: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("code", "reason")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[Goodbye.Code]
        FINISHED: _ClassVar[Goodbye.Code]
        REFUSED: _ClassVar[Goodbye.Code]
        BUSY: _ClassVar[Goodbye.Code]
        REPLACED: _ClassVar[Goodbye.Code]
        VIOLATION: _ClassVar[Goodbye.Code]
        STOPPED: _ClassVar[Goodbye.Code]
    UNKNOWN: Goodbye.Code
    FINISHED: Goodbye.Code
    REFUSED: Goodbye.Code
    BUSY: Goodbye.Code
    REPLACED: Goodbye.Code
    VIOLATION: Goodbye.Code
    STOPPED: Goodbye.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: Goodbye.Code
    reason: str
    def __init__(self, code: _Optional[_Union[Goodbye.Code, str]] = ..., reason: _Optional[str] = ...) -> None: ...
