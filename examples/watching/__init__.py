"""The shop under the eyes of Prometheus: metrics, a dashboard, alerts.

make example-watching       # the shop at http://127.0.0.1:8000, Prometheus at http://127.0.0.1:9090
"""
