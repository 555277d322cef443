"""A web app of Starlette that calls the example services.

RPCQ_URL=amqp://localhost/ uvicorn examples.starlette_app:app
"""

from decimal import Decimal

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from consumer_service.contracts import CalculatorApi, DivisionByZero, EchoApi
from rpcq import RpcqError
from rpcq.web import CancelOnDisconnect, Rpc, on_call_error

rpc = Rpc()
calculator = rpc.bind(CalculatorApi, timeout=5.0)
echoes = rpc.bind(EchoApi)


async def add(request: Request) -> JSONResponse:
    """The sum, which the service computes."""
    return JSONResponse(await calculator.add(int(request.query_params["x"]), int(request.query_params["y"])))


async def divide(request: Request) -> JSONResponse:
    """The quotient; 422 where there is none."""
    x, y = Decimal(request.query_params["x"]), Decimal(request.query_params["y"])
    return JSONResponse(str(await calculator.divide(x, y)))


async def echo(request: Request) -> JSONResponse:
    """The message; a user who leaves meanwhile ends the handler too."""
    delay = float(request.query_params.get("delay", "0"))
    return JSONResponse(await echoes.process(request.query_params["message"], delay))


async def ready(_request: Request) -> PlainTextResponse:
    """503 until all connections are up, and again when the app shuts down."""
    why = rpc.why_not_ready
    return PlainTextResponse(why or "ready", status_code=503 if why else 200)


app = Starlette(
    lifespan=rpc.lifespan,
    routes=[Route("/add", add), Route("/divide", divide), Route("/echo", echo), Route("/health/ready", ready)],
    middleware=[Middleware(CancelOnDisconnect)],
    exception_handlers={RpcqError: on_call_error(domain={DivisionByZero: 422})},
)
