"""The dashboard of the object store, as the programs see it."""

from dist_sae.telemetry.dashboards.panels import Page, graph
from dist_sae.telemetry.dashboards.queries import quantile, rate

STORE = Page(
    "store",
    "dist_sae: store",
    "The object store as its clients see it: errors, retries, bytes, latency.",
    {
        "Is it healthy?": (
            graph(
                "Operations that failed for good",
                "per second",
                rate("dist_sae_store_errors_total", "run, error"),
            ),
            graph(
                "Retries, share of requests",
                "share",
                rate("dist_sae_store_retries_total", "run, role").over(
                    rate("dist_sae_store_requests_total", "run, role")
                ),
                limits=(0.05, 0.1),
            ),
            graph(
                "Responses by status",
                "per second",
                rate("dist_sae_store_requests_total", "run, status"),
            ),
        ),
        "What limits it?": (
            graph("Bytes", "bytes/s", rate("dist_sae_store_bytes_total", "run, role, direction")),
            graph(
                "Requests", "per second", rate("dist_sae_store_requests_total", "run, operation")
            ),
            graph(
                "Time to response headers, p99",
                "seconds",
                quantile(0.99, "dist_sae_store_request_seconds", "run, operation"),
            ),
            graph(
                "Operation time, p50",
                "seconds",
                quantile(0.5, "dist_sae_store_operation_seconds", "run, operation"),
                width=12,
            ),
            graph(
                "Operation time, p99",
                "seconds",
                quantile(0.99, "dist_sae_store_operation_seconds", "run, operation"),
                width=12,
            ),
        ),
    },
)
