package composetest

import (
	"bytes"
	"errors"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"

	"trireme.dev/services/scaler/act"
)

// manifest is a part of an object of Kubernetes.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Rules    []struct {
		APIGroups     []string `yaml:"apiGroups"`
		Resources     []string
		ResourceNames []string `yaml:"resourceNames"`
		Verbs         []string
	}
	Subjects []struct{ Kind, Name string }
	RoleRef  struct{ Kind, Name string } `yaml:"roleRef"`
	Spec     struct {
		ScaleTargetRef struct{ Kind, Name string } `yaml:"scaleTargetRef"`
		Triggers       []struct {
			Type     string
			Metadata map[string]string
		}
		Template struct {
			Spec struct {
				ServiceAccountName string `yaml:"serviceAccountName"`
				Containers         []struct {
					Args []string
					Env  []struct{ Name, Value string }
				}
			}
		}
	}
}

func manifests(t *testing.T, path string) map[string]manifest {
	t.Helper()
	data, err := os.ReadFile(root + "/" + path)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]manifest{}
	for d := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var m manifest
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		all[m.Kind] = m
	}
}

// The scaler's service account may do what the scaler does by default, and nothing else.
func TestScalerMayScale(t *testing.T) {
	m := manifests(t, "deploy/kubernetes/scaler.yaml")
	account := m["ServiceAccount"].Metadata.Name
	pod := m["Deployment"].Spec.Template.Spec
	if pod.ServiceAccountName != account || m["RoleBinding"].RoleRef.Name != m["Role"].Metadata.Name || m["RoleBinding"].Subjects[0].Name != account {
		t.Error("pod, role and account do not belong together")
	}
	if len(m["Role"].Rules) != 1 {
		t.Fatalf("the role has %d rules", len(m["Role"].Rules))
	}
	rule := m["Role"].Rules[0]
	if !slices.Equal(rule.Verbs, []string{"get", "patch"}) || !slices.Equal(rule.APIGroups, []string{"apps"}) {
		t.Errorf("the role has the verbs %v of %v", rule.Verbs, rule.APIGroups)
	}
	for roles, target := range act.DefaultTargets {
		kind, name, _ := strings.Cut(target, "/")
		if !slices.Contains(rule.Resources, kind+"/scale") || !slices.Contains(rule.ResourceNames, name) {
			t.Errorf("the role does not allow to scale %s, which has the instances %s", target, roles)
		}
	}
	for _, r := range rule.Resources {
		if !strings.HasSuffix(r, "/scale") {
			t.Errorf("the role allows more than to scale: %s", r)
		}
	}
	for _, e := range pod.Containers[0].Env {
		if e.Name == "TRIREME_SCALER_PROCESSES" && act.Processes(e.Value) != act.Kubernetes {
			t.Errorf("%s is %q", e.Name, e.Value)
		}
	}
}

// KEDA asks for metrics that the scaler exposes.
func TestKEDAAsksForMetricsThatExist(t *testing.T) {
	code, err := os.ReadFile(root + "/services/scaler/metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	m := manifests(t, "deploy/kubernetes/keda.yaml")["ScaledObject"]
	if m.Spec.ScaleTargetRef.Name != "decoder" || len(m.Spec.Triggers) != 1 || m.Spec.Triggers[0].Metadata["ignoreNullValues"] != "false" {
		t.Fatalf("%+v", m.Spec)
	}
	names := regexp.MustCompile(`trireme_scaler_([a-z_]+)`).FindAllStringSubmatch(m.Spec.Triggers[0].Metadata["query"], -1)
	if len(names) != 3 {
		t.Errorf("the query asks for %v", names)
	}
	for _, n := range names {
		if !bytes.Contains(code, []byte(`"`+n[1]+`"`)) {
			t.Errorf("nobody exposes %s", n[0])
		}
	}
}
