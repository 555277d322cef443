"""A web app of aiohttp that calls the example services.

RPCQ_URL=amqp://localhost/ python -m examples.aiohttp_app
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal

from aiohttp import web

from consumer_service.contracts import CalculatorApi, DivisionByZero, EchoApi
from rpcq import RpcqError
from rpcq.web import Rpc, problem

rpc = Rpc()
calculator = rpc.bind(CalculatorApi, timeout=5.0)
echoes = rpc.bind(EchoApi)


async def opened(app: web.Application) -> AsyncIterator[None]:
    """Open while the app runs."""
    async with rpc.lifespan(app):
        yield


@web.middleware
async def problems(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors of calls as problem documents."""
    try:
        return await handler(request)
    except RpcqError as error:
        made = problem(error, {DivisionByZero: 422})
        return web.Response(status=made.status, headers=made.headers, body=made.body)


async def add(request: web.Request) -> web.Response:
    """The sum, which the service computes."""
    return web.json_response(await calculator.add(int(request.query["x"]), int(request.query["y"])))


async def divide(request: web.Request) -> web.Response:
    """The quotient; 422 where there is none."""
    return web.json_response(str(await calculator.divide(Decimal(request.query["x"]), Decimal(request.query["y"]))))


async def echo(request: web.Request) -> web.Response:
    """The message; a user who leaves meanwhile ends the handler too."""
    return web.json_response(await echoes.process(request.query["message"], float(request.query.get("delay", "0"))))


async def ready(_request: web.Request) -> web.Response:
    """503 until all connections are up, and again when the app shuts down."""
    why = rpc.why_not_ready
    return web.Response(text=why or "ready", status=503 if why else 200)


app = web.Application(middlewares=[problems])
app.cleanup_ctx.append(opened)
app.add_routes(
    [web.get("/add", add), web.get("/divide", divide), web.get("/echo", echo), web.get("/health/ready", ready)]
)

if __name__ == "__main__":
    # aiohttp cancels the handler of a user who leaves, where it is told to; no middleware is needed.
    web.run_app(app, handler_cancellation=True)
