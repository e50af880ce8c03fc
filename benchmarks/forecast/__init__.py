"""Is the forecast right? Predicted against actual, beside cheap predictors."""
