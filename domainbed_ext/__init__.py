"""The domain-generalization protocol: data sets, splits, sweeps, records, selection and tables."""
