"""Memory and time of a run, estimated before it starts."""

from tunesmith.estimate.forecast import Forecast, forecast

__all__ = ["Forecast", "forecast"]
