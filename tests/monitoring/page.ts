// What Grafana takes for a dashboard, as far as ours go: exact types, so that a misspelt key is an error.
import type {
  AnnotationQuery,
  Dashboard,
  DataQuery,
  FieldConfig,
  Panel,
  RowPanel,
  VariableModel,
} from "@grafana/schema";
import type { Options as Stat } from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type {
  FieldConfig as TableField,
  Options as Table,
} from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type {
  FieldConfig as GraphField,
  Options as Graph,
} from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// JSON has an enum's value where TypeScript wants its name
type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;

// the data source's own type is not in the package
type Query = DataQuery & {
  expr: string;
  legendFormat: string;
  instant?: boolean;
  range?: boolean;
  format?: "table";
};

type Shape<Name, Options, Custom> = Plain<
  Omit<Panel, "type" | "options" | "targets" | "fieldConfig">
> & {
  type: Name;
  options: Plain<Options>;
  targets: Plain<Query>[];
  fieldConfig: {
    defaults: Plain<Omit<FieldConfig, "custom">> & { custom?: Plain<Custom> };
    overrides: [];
  };
};

// the SDK is of Grafana 11: these are no longer there, and ignored
type Variable = VariableModel & { auto?: boolean; auto_min?: string; auto_count?: number };
type OldTable = Table & { footer?: object };

export type Page = Plain<Omit<Dashboard, "panels" | "annotations" | "templating">> & {
  panels: (
    | Plain<RowPanel>
    | Shape<"timeseries", Graph, GraphField>
    | Shape<"stat", Stat, never>
    | Shape<"table", OldTable, TableField>
  )[];
  annotations: { list: Plain<AnnotationQuery & { expr: string }>[] };
  templating: { list: Plain<Variable>[] };
};
