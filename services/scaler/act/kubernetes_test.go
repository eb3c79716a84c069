package act_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"trireme.dev/services/scaler/act"
	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// connect opens a Bus that is closed before the test's server stops.
func connect(t *testing.T, url string) *bus.Bus {
	t.Helper()
	b, err := bus.Connect(t.Context(), url, t.Name(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// term is a time of leading that ends with the test, or when the returned function is called. The record says that the one before has
// given up, so that no lease is waited for, which is so long that a slow machine does not lose it.
func term(t *testing.T, b *bus.Bus, id string) (*lead.Term, func()) {
	t.Helper()
	store, err := b.JetStream().KeyValue(t.Context(), wire.BucketScaler)
	if err == nil {
		_, err = store.Put(t.Context(), "leader", []byte("{}"))
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	began, ended := make(chan *lead.Term), make(chan error, 1)
	go func() {
		ended <- lead.Run(ctx, lead.Config{Bus: b, ID: id, Lease: time.Minute}, func(ctx context.Context, t *lead.Term) error {
			select {
			case began <- t:
			case <-ctx.Done():
			}
			<-ctx.Done()
			return nil
		})
	}()
	end := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(end)
	return <-began, end
}

// apiServer answers for the scale of one Deployment as kube-apiserver 1.35 does, over TLS, word for word where it refuses: a patch with
// a resource version is a compare-and-set, and one without is not; what the role does not name is forbidden, be it there or not. Each
// replica is an instance whose heartbeat comes and goes.
type apiServer struct {
	t   *testing.T
	url string
	dir string // of the service account
	bus *bus.Bus

	mu       sync.Mutex
	token    string
	version  int
	replicas int
	patches  int
	forbid   int    // so many answers are that the role does not allow it, as they are while a server that starts has not yet read the roles
	never    bool   // replicas that start are not ready
	fail     int    // so many answers are 500
	stranger int    // so many are that the token is nobody's
	between  func() // is done once before the next patch; mu is held
	running  []context.CancelFunc
}

func newAPIServer(t *testing.T, b *bus.Bus, replicas int) *apiServer {
	a := &apiServer{t: t, dir: t.TempDir(), bus: b, token: "first", version: 41}
	s := httptest.NewTLSServer(a)
	t.Cleanup(s.Close)
	a.url = s.URL
	a.write("ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	a.write("token", a.token+"\n")
	a.write("namespace", "models")
	t.Cleanup(func() { a.set(0) })
	a.set(replicas)
	return a
}

func (a *apiServer) write(name, text string) {
	a.t.Helper()
	if err := os.WriteFile(filepath.Join(a.dir, name), []byte(text), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// set has so many replicas. mu is held, or nobody else is there.
func (a *apiServer) set(n int) {
	a.replicas = n
	a.version++
	for len(a.running) < n {
		ctx, cancel := context.WithCancel(context.Background())
		name := fmt.Sprint("decoder-", len(a.running))
		ready := !a.never
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = a.bus.Announce(ctx, func() wire.Instance {
				return wire.Instance{ID: name, Name: name, Node: "node", Role: "decode", Ready: ready, NPUs: []int{7}}
			})
		}()
		a.running = append(a.running, func() { cancel(); <-done })
	}
	for len(a.running) > n {
		a.running[len(a.running)-1]()
		a.running = a.running[:len(a.running)-1]
	}
}

// ServeHTTP implements http.Handler.
func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	refuse := func(code int, reason, format string, args ...any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "metadata": map[string]any{}, "status": "Failure",
			"message": fmt.Sprintf(format, args...), "reason": reason, "code": code})
	}
	var namespace, kind, name string
	parts := strings.Split(r.URL.Path, "/") // /apis/apps/v1/namespaces/models/deployments/decoder/scale
	if len(parts) != 9 || !strings.HasPrefix(r.URL.Path, "/apis/apps/v1/namespaces/") || parts[8] != "scale" {
		a.t.Errorf("%s %s is asked for", r.Method, r.URL.Path)
		refuse(http.StatusNotFound, "NotFound", "the server could not find the requested resource")
		return
	}
	namespace, kind, name = parts[5], parts[6], parts[7]
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	user := "system:serviceaccount:models:trireme-scaler"
	if token == "" {
		user = "system:anonymous"
	}
	switch {
	case token != "" && (token != a.token || a.stranger > 0):
		a.stranger = max(0, a.stranger-1)
		refuse(http.StatusUnauthorized, "Unauthorized", "Unauthorized")
		return
	case token == "" || a.forbid > 0 || namespace != "models" || !slices.Contains([]string{"encoder", "prefill", "decoder"}, name):
		a.forbid = max(0, a.forbid-1)
		refuse(http.StatusForbidden, "Forbidden", `%s.apps %q is forbidden: User %q cannot %s resource "%s/scale" in API group "apps" in the namespace %q`,
			kind, name, user, strings.ToLower(r.Method), kind, namespace)
		return
	case a.fail > 0:
		a.fail--
		refuse(http.StatusInternalServerError, "", "etcdserver: leader changed")
		return
	case kind != "deployments" || name != "decoder":
		refuse(http.StatusNotFound, "NotFound", "%s.apps %q not found", kind, name)
		return
	}
	if r.Method == http.MethodPatch {
		if a.between != nil {
			a.between()
			a.between = nil
		}
		if r.Header.Get("Content-Type") != "application/merge-patch+json" {
			refuse(http.StatusUnsupportedMediaType, "UnsupportedMediaType", "415: Unsupported Media Type")
			return
		}
		var patch struct {
			Metadata struct{ ResourceVersion string }
			Spec     struct{ Replicas *int }
		}
		data, _ := io.ReadAll(r.Body)
		if err := json.Unmarshal(data, &patch); err != nil {
			refuse(http.StatusBadRequest, "BadRequest", "error decoding patch: %v", err)
			return
		}
		if v := patch.Metadata.ResourceVersion; v != "" && v != fmt.Sprint(a.version) {
			refuse(http.StatusConflict, "Conflict",
				"Operation cannot be fulfilled on deployments.apps %q: the object has been modified; please apply your changes to the latest version and try again", name)
			return
		}
		if n := patch.Spec.Replicas; n != nil && *n < 0 {
			refuse(http.StatusUnprocessableEntity, "Invalid", "Scale.autoscaling %q is invalid: spec.replicas: Invalid value: %d: must be greater than or equal to 0", name, *n)
			return
		} else if n != nil {
			a.patches++
			a.set(*n)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	spec := map[string]any{}
	if a.replicas != 0 { // it leaves 0 out
		spec["replicas"] = a.replicas
	}
	_ = json.NewEncoder(w).Encode(map[string]any{
		"kind": "Scale", "apiVersion": "autoscaling/v1",
		"metadata": map[string]any{"name": name, "namespace": namespace, "resourceVersion": fmt.Sprint(a.version)},
		"spec":     spec, "status": map[string]any{"replicas": len(a.running), "selector": "app=decoder"},
	})
}

// Replicas are changed by compare-and-set over the API server's own resource versions, once, whoever is killed or comes between.
func TestKubernetes(t *testing.T) {
	s := bustest.Run(t)
	b := connect(t, s.URL())
	tm, _ := term(t, b, "one")
	add := autoscale.Change{Action: autoscale.Add, Roles: "D", Node: "node", NPUs: 1, Count: 2}
	remove := autoscale.Change{Action: autoscale.Remove, Roles: "D", Node: "node", Instance: "decoder-0"}
	noted := func(from, to, ready int) json.RawMessage {
		return json.RawMessage(fmt.Sprintf(`{"target":"deployments/decoder","from":%d,"to":%d,"ready":%d}`, from, to, ready))
	}
	const ever, brief = 1 << 30, 100 * time.Millisecond
	impatient := func(c *act.Config) { c.Cluster.Patience = brief }
	giveUp := func(c *act.Config) { c.Timeout = brief }
	for _, x := range []struct {
		what     string
		change   autoscale.Change
		note     json.RawMessage // of a leader before
		before   func(a *apiServer)
		config   func(c *act.Config) // where something does not come, which is waited for
		replicas int                 // then
		patches  int                 // that were accepted
		why      string
	}{
		{what: "two more", change: add, replicas: 3, patches: 1},
		{what: "one less", change: remove, replicas: 0, patches: 1},
		{what: "the first ones", change: add, before: func(a *apiServer) { a.set(0) }, replicas: 2, patches: 1},
		{what: "someone else writes in between", change: add, before: func(a *apiServer) { a.between = func() { a.version++ } }, replicas: 3, patches: 1},
		{what: "a leader before has noted it and not asked", change: add, note: noted(1, 3, 1), replicas: 3, patches: 1},
		{what: "a leader before has asked", change: add, note: noted(1, 3, 1), before: func(a *apiServer) { a.set(3) }, replicas: 3},
		{what: "a leader before asks just now", change: add, note: noted(1, 3, 1), before: func(a *apiServer) { a.between = func() { a.set(3) } }, replicas: 3},
		{what: "an operator scales just now", change: add, before: func(a *apiServer) { a.between = func() { a.set(5) } }, replicas: 5,
			why: "somebody else scales deployments/decoder: it had 1 replicas and has 5, where 3 were wanted"},
		{what: "the account may not", change: add, before: func(a *apiServer) { a.forbid = ever }, config: impatient, replicas: 1,
			why: `cannot get resource "deployments/scale" in API group "apps" in the namespace "models"; if that is RBAC, the scaler's service account needs the verbs get and patch of deployments/scale of "decoder"`},
		{what: "the account may not scale that", change: add, config: func(c *act.Config) { impatient(c); c.Cluster.Targets = map[string]string{"D": "statefulsets/llm"} },
			replicas: 1, why: `needs the verbs get and patch of statefulsets/scale of "llm"`},
		{what: "the API server starts and has not yet read the roles", change: add, before: func(a *apiServer) { a.forbid = 3 }, replicas: 3, patches: 1},
		{what: "it has not yet read the roles when it is asked to change", change: add, before: func(a *apiServer) { a.between = func() { a.version++; a.forbid = 3 } }, replicas: 3, patches: 1},
		{what: "it does not know the account yet", change: add, before: func(a *apiServer) { a.stranger = 3 }, replicas: 3, patches: 1},
		{what: "the token has expired", change: add, before: func(a *apiServer) { a.stranger = ever }, config: impatient, replicas: 1,
			why: "Kubernetes answers 401: Unauthorized; the service account's token has expired, or the account is gone"},
		{what: "there is nothing in the token's file", change: add, before: func(a *apiServer) { a.write("token", "\n") }, config: giveUp, replicas: 1, why: "token is empty"},
		{what: "nobody answers", change: add, config: func(c *act.Config) { giveUp(c); c.Cluster.API = "https://127.0.0.1:1" }, replicas: 1, why: "nothing has come of it within 100ms"},
		{what: "there is no such Deployment", change: autoscale.Change{Action: autoscale.Add, Roles: "E", Count: 1}, replicas: 1,
			why: `scaling deployments/encoder in namespace models: Kubernetes answers 404: deployments.apps "encoder" not found`},
		{what: "the token was replaced", change: add, before: func(a *apiServer) { a.token = "second"; a.write("token", "second") }, replicas: 3, patches: 1},
		{what: "the API server fails for a while", change: add, before: func(a *apiServer) { a.fail = 3 }, replicas: 3, patches: 1},
		{what: "they are not ready in time", change: add, before: func(a *apiServer) { a.never = true }, config: func(c *act.Config) { c.Ready = brief },
			replicas: 1, patches: 2, why: "of the replicas 2 to 3 of deployments/decoder not all were ready"},
		{what: "roles of nothing", change: autoscale.Change{Action: autoscale.Add, Roles: "EP", Count: 1}, replicas: 1, why: "not said what has the pods of instances EP"},
		{what: "what was noted is of another version", change: add, note: json.RawMessage(`[]`), replicas: 1, why: "cannot be read"},
	} {
		t.Run(x.what, func(t *testing.T) {
			mine := connect(t, s.URL())
			api := newAPIServer(t, mine, 1)
			view, err := mine.Instances(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(time.Minute); len(view.Role("decode")) == 0 && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			if x.before != nil {
				api.mu.Lock()
				x.before(api)
				api.mu.Unlock()
			}
			cfg := act.Config{Bus: mine, Processes: act.Kubernetes, Ready: time.Minute, Timeout: time.Minute,
				Cluster: act.Cluster{API: api.url, Account: api.dir, Patience: time.Minute}}
			if x.config != nil {
				x.config(&cfg)
			}
			a, err := act.New(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			op := &lead.Operation{ID: "op", Change: x.change, Note: x.note}
			out, err := a.Do(t.Context(), tm, op)
			if err != nil || out.Done != (x.why == "") || !strings.Contains(out.Why, x.why) {
				t.Errorf("%+v, %v; want %q", out, err, x.why)
			}
			api.mu.Lock()
			defer api.mu.Unlock()
			if api.replicas != x.replicas || api.patches != x.patches {
				t.Errorf("%d replicas after %d patches; want %d after %d", api.replicas, api.patches, x.replicas, x.patches)
			}
		})
	}
}

// Who does not lead asks for nothing any more.
func TestKubernetesDeposed(t *testing.T) {
	b := connect(t, bustest.Run(t).URL())
	tm, end := term(t, b, "one")
	api := newAPIServer(t, b, 1)
	a, err := act.New(t.Context(), act.Config{Bus: b, Processes: act.Kubernetes, Cluster: act.Cluster{API: api.url, Account: api.dir}})
	if err != nil {
		t.Fatal(err)
	}
	end()
	op := &lead.Operation{ID: "op", Change: autoscale.Change{Action: autoscale.Add, Roles: "D", Count: 1}}
	if out, err := a.Do(t.Context(), tm, op); err == nil || api.patches != 0 {
		t.Errorf("%+v, %v, %d patches", out, err, api.patches)
	}
}

// The cluster's certificate is replaced while the scaler runs, as the token is.
func TestKubernetesAuthority(t *testing.T) {
	b := connect(t, bustest.Run(t).URL())
	tm, _ := term(t, b, "one")
	api := newAPIServer(t, b, 0)
	now, err := os.ReadFile(filepath.Join(api.dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	api.write("ca.crt", before(t))
	op := &lead.Operation{ID: "op", Change: autoscale.Change{Action: autoscale.Add, Roles: "D", Count: 1}}
	cfg := act.Config{Bus: b, Processes: act.Kubernetes, Cluster: act.Cluster{API: api.url, Account: api.dir}, Timeout: 100 * time.Millisecond}
	stale, err := act.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	out, err := stale.Do(t.Context(), tm, op)
	if err != nil || out.Done || out.Why == "" {
		t.Errorf("with another authority: %+v, %v", out, err)
	}
	cfg.Timeout = time.Minute
	a, err := act.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	api.write("ca.crt", string(now))
	if out, err := a.Do(t.Context(), tm, op); err != nil || !out.Done {
		t.Errorf("%+v, %v", out, err)
	}
}

// before is the certificate of an authority that the cluster does not have any more.
func before(t *testing.T) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// What is not a cluster is said when the scaler starts.
func TestKubernetesConfig(t *testing.T) {
	b := connect(t, bustest.Run(t).URL())
	api := newAPIServer(t, b, 0)
	for want, c := range map[string]act.Cluster{
		"reading its namespace":            {API: api.url, Account: t.TempDir()},
		"write deployments/NAME":           {API: api.url, Account: api.dir, Targets: map[string]string{"D": "pods/x"}},
		"KUBERNETES_SERVICE_HOST":          {Account: api.dir},
		"reading the cluster's certificat": {API: api.url, Account: t.TempDir(), Namespace: "x"},
	} {
		t.Setenv("KUBERNETES_SERVICE_HOST", "")
		if _, err := act.New(t.Context(), act.Config{Bus: b, Processes: act.Kubernetes, Cluster: c}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
