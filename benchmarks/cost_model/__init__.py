"""The cost model: shapes of policies, tables at the published sizes, operations, bytes and roofline milliseconds."""
