"""The shop on the web: calls as JSON, and their errors as problem documents, which its OpenAPI describes."""

from decimal import Decimal
from typing import Annotated

from fastapi import Depends, FastAPI

from examples.sample.contracts import Article, Order, OrdersApi, OutOfStock, StockApi, TooExpensive, UnknownArticle
from rpcq import RpcqError
from rpcq.web import CancelOnDisconnect, Rpc, on_call_error


def sold_out(error: OutOfStock) -> tuple[int, str]:
    """410 if nothing is left, 409 if a smaller order may be placed."""
    return (409, "Not enough left") if error.left else (410, "Sold out")


rpc = Rpc()
errors = on_call_error({UnknownArticle: 404, OutOfStock: sold_out, TooExpensive: (402, "Too expensive")})
app = FastAPI(title="Shop", lifespan=rpc.lifespan, responses=errors.responses)
app.add_exception_handler(RpcqError, errors)
app.add_middleware(CancelOnDisconnect)

Stock = Annotated[StockApi, Depends(rpc.api(StockApi, timeout=2.0))]
Orders = Annotated[OrdersApi, Depends(rpc.api(OrdersApi, timeout=5.0))]


@app.get("/articles/{sku}")
async def article(sku: str, stock: Stock) -> Article:
    """One article."""
    return await stock.find(sku)


@app.post("/orders", status_code=201)
async def order(sku: str, orders: Orders, quantity: int = 1, limit: Decimal | None = None) -> Order:
    """Place an order."""
    return await orders.place(sku, quantity, limit=limit)
