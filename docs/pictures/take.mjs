// Takes the pictures of docs/deployments.md from servers that run (`earloom up`, `earloom deploy`, one run of the chain):
//   npm i playwright-core && node docs/pictures/take.mjs http://127.0.0.1:4200 http://127.0.0.1:5000 docs/pictures
// with Debian's chromium (another: CHROMIUM=/path). Nothing but those two servers is asked.
import { chromium } from 'playwright-core'

const [, , prefect, mlflow, folder] = process.argv
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--use-angle=swiftshader', '--enable-unsafe-swiftshader', '--force-color-profile=srgb'],
})
const ask = async (path, body) => {
  const answer = await fetch(`${prefect}/api${path}`, body && {
    method: 'POST', body: JSON.stringify(body), headers: { 'content-type': 'application/json' } })
  return answer.json()
}

async function take(name, url, { width = 1200, height = 1000, wait = 8000, before = async () => {} } = {}) {
  const page = await browser.newPage({ viewport: { width, height }, colorScheme: 'light' })
  await page.route('**/*', (route) => (/^https?:\/\/(127\.0\.0\.1|localhost)[:/]/.test(route.request().url()) ||
    /^(data|blob):/.test(route.request().url()) ? route.continue() : route.abort()))
  await page.goto(url, { waitUntil: 'domcontentloaded' })
  await page.waitForTimeout(wait)
  await before(page)
  await page.screenshot({ path: `${folder}/${name}.png` })
  await page.close()
}

const chain = await ask('/deployments/name/earloom/chain')
const [run] = await ask('/flow_runs/filter', {
  sort: 'START_TIME_DESC', limit: 1,
  flow_runs: { deployment_id: { any_: [chain.id] }, state: { type: { any_: ['COMPLETED'] } } } })
const parts = await ask('/flow_runs/filter', { flow_runs: { parent_flow_run_id: { any_: [run.id] } } })
const shown = await ask('/artifacts/filter', {
  artifacts: { flow_run_id: { any_: [run.id, ...parts.map((part) => part.id)] } }, limit: 200 })
const curves = shown.find((one) => one.key === 'curves')

await take('form', `${prefect}/deployments/deployment/${chain.id}/run`, { height: 1300 })
await take('run', `${prefect}/runs/flow-run/${run.id}`, {
  height: 1150, before: async (page) => { await page.getByText('Artifacts', { exact: true }).first().click(); await page.waitForTimeout(4000) } })
if (curves) await take('curves', `${prefect}/artifacts/artifact/${curves.id}`, { height: 1150 })
if (mlflow) {
  const name = `${run.parameters.config.arch}-${run.parameters.config.data.split('/').filter(Boolean).at(-1)}`
  const found = await (await fetch(`${mlflow}/api/2.0/mlflow/registered-models/alias?name=${name}&alias=candidate`)).json()
  const before = async (page) => { await page.mouse.click(1364, 42); await page.waitForTimeout(3000) } // its assistant
  await take('model', `${mlflow}/#/models/${name}/versions/${found.model_version.version}`,
    { width: 1400, height: 850, wait: 12000, before })
}
await browser.close()
