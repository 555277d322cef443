"""A web app of FastAPI that calls the example services.

RPCQ_URL=amqp://localhost/ uvicorn examples.fastapi_app:app
"""

from decimal import Decimal
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException

from consumer_service.contracts import CalculatorApi, DivisionByZero, EchoApi
from rpcq import RpcqError
from rpcq.web import CancelOnDisconnect, Rpc, on_call_error

rpc = Rpc()
errors = on_call_error(domain={DivisionByZero: 422})
app = FastAPI(lifespan=rpc.lifespan, responses=errors.responses)
app.add_exception_handler(RpcqError, errors)
app.add_middleware(CancelOnDisconnect)

Calculator = Annotated[CalculatorApi, Depends(rpc.api(CalculatorApi, timeout=5.0))]
Echo = Annotated[EchoApi, Depends(rpc.api(EchoApi))]


@app.get("/add")
async def add(x: int, y: int, calculator: Calculator) -> int:
    """The sum, which the service computes."""
    return await calculator.add(x, y)


@app.get("/divide")
async def divide(x: Decimal, y: Decimal, calculator: Calculator) -> Decimal:
    """The quotient; 422 where there is none."""
    return await calculator.divide(x, y)


@app.get("/echo")
async def echo(message: str, echo: Echo, delay: float = 0.0) -> str:
    """The message; a user who leaves meanwhile ends the handler too."""
    return await echo.process(message, delay)


@app.get("/health/live")
async def live() -> str:
    """The app runs: whether the broker does is none of its business."""
    return "alive"


@app.get("/health/ready")
async def ready() -> str:
    """503 until all connections are up, and again when the app shuts down."""
    if why := rpc.why_not_ready:
        raise HTTPException(503, why)
    return "ready"
