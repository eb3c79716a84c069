package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/wire"
)

// The admin endpoints are for operators, on an address of their own: who reaches it can change instances. They ask as the commands
// `trireme scale` and `trireme rebalance` do.
//
//	GET  /admin/instances                     heartbeats
//	POST /admin/instances/{who}/scale         adminChange; npus: 4, "+1" or "-2"
//	POST /admin/instances/{who}/rebalance     adminChange
//	POST /admin/npus/{node}/{index}/role      adminRole: the NPU goes over to an instance of a role
//	POST /admin/replicas                      adminReplicas: so many instances of a kind, as `trireme scale --replicas`
//
// who is decoder, prefill or encoder, where one runs, or an instance's id or name. The answer to POST comes when the operation has ended: a
// wire.ChangeReport, of a role a bus.RoleReport, of replicas a wire.ReplicasReport, with 200 if it is in force or there was nothing to do, 409 if it was refused or given up, 504 if it goes on.

// adminChange is the body of a POST; what is left out is as with the commands.
type adminChange struct {
	NPUs    json.RawMessage `json:"npus"`
	DryRun  bool            `json:"dry_run"`
	Timeout string          `json:"timeout"`   // 60s
	Rate    int64           `json:"copy_rate"` // bytes a second
	Spare   *float64        `json:"spare"`
	Slack   *float64        `json:"slack"`
}

// adminRole is the body of a POST that has an NPU go over to an instance of a role.
type adminRole struct {
	Role     string `json:"role"`     // encoder, prefill, decoder, or letters such as EP
	Instance string `json:"instance"` // which one, by id or name; else that with the fewest NPUs
	adminChange
}

// adminReplicas is the body of a POST that changes the number of instances, which `trireme up` starts and ends.
type adminReplicas struct {
	Role     string `json:"role"`     // encoder, prefill, decoder, or letters such as EP
	Replicas *int   `json:"replicas"` // that there shall be
	Node     string `json:"node"`     // where there are several
	DryRun   bool   `json:"dry_run"`
	Timeout  string `json:"timeout"`
}

// adminAnswer is a report, or why there is none.
type adminAnswer struct {
	*wire.ChangeReport
	Error string `json:"error,omitempty"`
}

// adminBody is the most bytes of a body.
const adminBody = 64 << 10

// serveAdmin serves the admin endpoints on l until ctx ends; operations go on without it.
func (g *Gateway) serveAdmin(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /admin/instances", func(w http.ResponseWriter, _ *http.Request) {
		writeAdmin(w, http.StatusOK, map[string]any{"instances": g.instances.All()})
	})
	mux.HandleFunc("POST /admin/instances/{who}/{kind}", func(w http.ResponseWriter, r *http.Request) {
		report, err := g.adminChange(w, r)
		answer, status := adminAnswer{ChangeReport: report}, http.StatusOK
		if err != nil {
			answer.Error, status = err.Error(), adminStatus(err)
		}
		writeAdmin(w, status, answer)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeAdmin(w, http.StatusNotFound, adminAnswer{Error: "there is nothing at " + r.Method + " " + r.URL.EscapedPath() +
			"; there are GET /admin/instances, POST /admin/instances/NAME/scale and …/rebalance, POST /admin/npus/NODE/NUMBER/role and POST /admin/replicas"})
	})
	mux.HandleFunc("POST /admin/npus/{node}/{npu}/role", func(w http.ResponseWriter, r *http.Request) {
		report, err := g.adminRole(w, r)
		answer, status := struct {
			*bus.RoleReport
			Error string `json:"error,omitempty"`
		}{RoleReport: report}, http.StatusOK
		if err != nil {
			answer.Error, status = err.Error(), adminStatus(err)
		}
		writeAdmin(w, status, answer)
	})
	mux.HandleFunc("POST /admin/replicas", func(w http.ResponseWriter, r *http.Request) {
		report, err := g.adminReplicas(w, r)
		answer, status := struct {
			*wire.ReplicasReport
			Error string `json:"error,omitempty"`
		}{ReplicasReport: report}, http.StatusOK
		if err != nil {
			answer.Error, status = err.Error(), adminStatus(err)
		}
		writeAdmin(w, status, answer)
	})
	server := &http.Server{Handler: withoutPages(mux), ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving operators on %s: %w", l.Addr(), err)
	}
	return nil
}

// errAdmin is wrapped by errors of who asks.
var errAdmin = errors.New("the request cannot be read")

// withoutPages lets no page change anything. Who reaches the address may do all, and a browser of theirs does, for pages of anywhere that they
// look at: also for one whose name is made to lead here, to which it is one of this server. As there are no pages here, whatever is from one
// is refused; browsers say so of all but what is only read.
func withoutPages(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reads := r.Method == http.MethodGet || r.Method == http.MethodHead
		if !reads && (r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "") {
			writeAdmin(w, http.StatusForbidden, adminAnswer{Error: "pages in browsers may change nothing here"})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// adminStatus is the HTTP status of an error.
func adminStatus(err error) int {
	switch {
	case errors.Is(err, bus.ErrNoInstance), errors.Is(err, bus.ErrNoStarter):
		return http.StatusNotFound
	case errors.Is(err, errAdmin), errors.Is(err, conf.ErrNPUs):
		return http.StatusBadRequest
	case errors.Is(err, bus.ErrRefused), errors.Is(err, bus.ErrGivenUp):
		return http.StatusConflict
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

func writeAdmin(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // who asked has gone
}

// readAdmin reads the body of a POST, of which nothing is needed where all is to be as with the commands.
func readAdmin(w http.ResponseWriter, r *http.Request, body any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, adminBody))
	d.DisallowUnknownFields()
	if err := d.Decode(body); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %w", errAdmin, err)
	}
	return nil
}

// adminChange has an instance change, and waits for that.
func (g *Gateway) adminChange(w http.ResponseWriter, r *http.Request) (*wire.ChangeReport, error) {
	kind := r.PathValue("kind")
	if kind != wire.ChangeScale && kind != wire.ChangeRebalance {
		return nil, fmt.Errorf("%w: instances can %s or %s, not %s", errAdmin, wire.ChangeScale, wire.ChangeRebalance, kind)
	}
	i, err := bus.Meant(g.instances.Named(), r.PathValue("who"), "")
	if err != nil {
		return nil, err
	}
	var body adminChange
	if err := readAdmin(w, r, &body); err != nil {
		return nil, err
	}
	change, err := body.change(kind)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), change.Left+time.Minute)
	defer cancel()
	return g.bus.Change(ctx, i.ID, i.Record(), change, nil)
}

// adminRole has an NPU go over to an instance of a role, and waits for that.
func (g *Gateway) adminRole(w http.ResponseWriter, r *http.Request) (*bus.RoleReport, error) {
	var body adminRole
	if err := readAdmin(w, r, &body); err != nil {
		return nil, err
	}
	q := bus.RoleSwitch{Node: r.PathValue("node"), Instance: body.Instance}
	var err error
	if q.NPU, err = strconv.Atoi(r.PathValue("npu")); err != nil || body.NPUs != nil {
		return nil, fmt.Errorf("%w: the path names an NPU, as /admin/npus/NODE/3/role, and no number of NPUs is given", errAdmin)
	}
	if q.Role, err = bus.RoleNamed(body.Role); err != nil {
		return nil, err
	}
	if q.Change, err = body.change(wire.ChangeRole); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), q.Change.Left+time.Minute)
	defer cancel()
	return g.bus.SwitchRole(ctx, g.instances.Named(), q, nil)
}

// adminReplicas has instances started or ended, and waits for that.
func (g *Gateway) adminReplicas(w http.ResponseWriter, r *http.Request) (*wire.ReplicasReport, error) {
	var body adminReplicas
	if err := readAdmin(w, r, &body); err != nil {
		return nil, err
	}
	if body.Role == "" || body.Replicas == nil {
		return nil, fmt.Errorf(`%w: role or replicas is missing: write {"role": "decoder", "replicas": 2}`, errAdmin)
	}
	left, err := adminTimeout(body.Timeout)
	if err != nil {
		return nil, err
	}
	if body.Node == "" {
		nodes := map[string]bool{}
		for _, i := range g.instances.All() {
			nodes[i.Node] = true
		}
		delete(nodes, "") // of gateways
		if len(nodes) != 1 {
			return nil, fmt.Errorf("%w: node is missing: instances are on %s", errAdmin, strings.Join(slices.Sorted(maps.Keys(nodes)), ", "))
		}
		body.Node = slices.Collect(maps.Keys(nodes))[0]
	}
	ctx, cancel := context.WithTimeout(r.Context(), left)
	defer cancel()
	report, err := g.bus.SetReplicas(ctx, body.Node, wire.Replicas{Roles: bus.RoleLetters(body.Role), Count: *body.Replicas, Check: body.DryRun}, nil)
	return &report, err
}

// adminTimeout reads how long something may take: a minute, where nothing is said.
func adminTimeout(text string) (time.Duration, error) {
	if text == "" {
		return time.Minute, nil
	}
	left, err := time.ParseDuration(text)
	if err != nil || left <= 0 {
		return 0, fmt.Errorf("%w: timeout %q is no duration like 60s", errAdmin, text)
	}
	return left, nil
}

// change is what the body asks an instance for.
func (a *adminChange) change(kind string) (wire.Change, error) {
	c := wire.Change{ID: bus.NewChangeID(), Kind: kind, DryRun: a.DryRun, Rate: a.Rate, Spare: wire.DefaultSpare, Slack: wire.DefaultSlack}
	var err error
	if c.Left, err = adminTimeout(a.Timeout); err != nil {
		return c, err
	}
	if a.Spare != nil {
		c.Spare = *a.Spare
	}
	if a.Slack != nil {
		c.Slack = *a.Slack
	}
	if c.Spare < 0 || c.Slack < 0 || c.Rate < 0 {
		return c, fmt.Errorf("%w: spare, slack and copy_rate cannot be negative", errAdmin)
	}
	if kind != wire.ChangeScale {
		return c, nil
	}
	if a.NPUs == nil {
		return c, fmt.Errorf("%w: npus is missing: write 4, \"+1\" or \"-2\"", errAdmin)
	}
	text := []byte(a.NPUs) // a number, or a string
	if s := ""; json.Unmarshal(a.NPUs, &s) == nil {
		text = []byte(s)
	}
	var count conf.NPUCount
	if err := count.UnmarshalText(text); err != nil {
		return c, fmt.Errorf("%w: npus: %w", errAdmin, err)
	}
	c.NPUs, c.By = count.Change()
	return c, nil
}
